//! `gptq bench prefill`: tokens of a prompt per second, beside the speed of the matrix product.

use std::path::Path;

use anyhow::Result;
use gptq_kernels::{Backend, Batch, KV_BLOCK_ROWS, SequenceRows};
use gptq_runtime::layout;
use gptq_runtime::model::{Model, ModelFiles};

use super::ceilings::{Ceilings, attention_flops, sustained_product};
use super::{Figure, Workspace, median, print};
use crate::args::PrefillBenchArgs;
use crate::commands::common::{self, Chosen, DeviceKind};

/// How often each is measured; the median counts.
const TIMES: usize = 3;

pub fn run(args: &PrefillBenchArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let (title, figures) = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => report(&cpu, DeviceKind::Cpu, args, &dir, &files)?,
        Chosen::Gpu(gpu) => report(&gpu, DeviceKind::Gpu, args, &dir, &files)?,
    };
    print(args.json, &title, &figures)
}

/// A title, and what was measured.
fn report<B: Backend>(
    device: &B,
    kind: DeviceKind,
    args: &PrefillBenchArgs,
    dir: &Path,
    files: &ModelFiles,
) -> Result<(String, Vec<Figure>)> {
    let work = Workspace::new()?;
    let ceilings = Ceilings::measure(device, kind, &files.config, work.path())?;
    let kv_dtype = args.kv_cache.kv_cache_dtype;
    let model = common::load_model(device, dir)?.with_kv_dtype(kv_dtype.into());
    let mut figures = ceilings.figures();
    figures.extend(measure(&model, files, &args.tokens, &ceilings)?);
    if kind == DeviceKind::Gpu {
        // Last, since it heats the GPU.
        figures.push(sustained_product(device, &files.config, &ceilings)?);
    }
    Ok((format!("{}{}, on {}", args.model, common::kv_note(kv_dtype), device.name()), figures))
}

/// Tokens a second for prompts of each length, beside what the product allows.
pub(super) fn measure<B: Backend>(
    model: &Model<B>,
    files: &ModelFiles,
    lengths: &[usize],
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let vocab = files.config.vocab_size as u32;
    let one = |tokens: &usize| {
        let ids: Vec<u32> = (0..*tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
        let blocks = tokens.div_ceil(KV_BLOCK_ROWS);
        let mut caches = model.kv_caches(blocks)?;
        let sequence = SequenceRows { rows: *tokens, context: 0, blocks: (0..blocks as u32).collect() };
        let batch = Batch { sequences: vec![sequence] };
        let seconds = median(model.backend(), TIMES, || {
            let hidden = model.forward(&ids, &batch, Some(&mut caches))?;
            model.logits(&hidden, tokens - 1..*tokens)
        })?;
        let flops = flops(files, *tokens);
        let what = format!("prompt of {tokens}{}", common::kv_note(model.kv_dtype()));
        let figure = Figure::new(what, *tokens as f64 / seconds, "tokens/s");
        let figure = figure.beside(flops / seconds / 1e12, "TFLOP/s").by(model.kernels(*tokens));
        Ok(figure.share("the matrix product", flops / seconds / ceilings.matmul))
    };
    lengths.iter().map(one).collect()
}

/// Products of every layer's linears that a token goes through, and its attention.
fn flops(files: &ModelFiles, tokens: usize) -> f64 {
    let layers = files.config.num_hidden_layers as f64;
    2.0 * tokens as f64 * layout::active_weights(&files.config)
        + layers * attention_flops(&files.config, tokens)
}
