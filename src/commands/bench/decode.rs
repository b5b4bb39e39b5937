//! `gptq bench decode`: tokens per second of one sequence and of many, beside the speed of memory.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::{Backend, Batch, KV_BLOCK_ROWS, RowSampling, SequenceRows};
use gptq_runtime::layout;
use gptq_runtime::model::{Decoder, Model, ModelFiles};
use gptq_runtime::sampling::{Sampler, SamplingParams};

use super::ceilings::Ceilings;
use super::{Figure, Workspace, print, tensor_bytes, tensors};
use crate::args::DecodeBenchArgs;
use crate::commands::common::{self, Chosen, DeviceKind};

pub fn run(args: &DecodeBenchArgs) -> Result<()> {
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
    args: &DecodeBenchArgs,
    dir: &Path,
    files: &ModelFiles,
) -> Result<(String, Vec<Figure>)> {
    let work = Workspace::new()?;
    let ceilings = Ceilings::measure(device, kind, &files.config, work.path())?;
    let kv_dtype = args.kv_cache.kv_cache_dtype;
    let model = common::load_model(device, dir)?.with_kv_dtype(kv_dtype.into());
    let DecodeBenchArgs { temperature, top_p, top_k, .. } = *args;
    let params = SamplingParams { temperature, top_p, top_k, repetition_penalty: 1.0, seed: 0 };
    let contexts = args.context..args.context + args.tokens;
    let mut figures = ceilings.figures();
    figures.extend(measure(&model, files, &args.batch, &params, contexts, &ceilings)?);
    let (from, to, note) = (args.context, args.context + args.tokens, common::kv_note(kv_dtype));
    Ok((format!("{}, contexts from {from} to {to}{note}, on {}", args.model, device.name()), figures))
}

/// Tokens a second for each number of sequences, beside what memory allows.
pub(super) fn measure<B: Backend>(
    model: &Model<B>,
    files: &ModelFiles,
    batches: &[usize],
    params: &SamplingParams,
    contexts: Range<usize>,
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let one = |batch: &usize| {
        let seconds = seconds_a_step(model, *batch, params, contexts.clone())?;
        let row = Sampler::new(params.clone())?.row_at(0);
        let context = (contexts.start + contexts.end) / 2;
        let read = bytes_a_step(model, files, (*batch, context), model.head_share(&[row]));
        let what = format!("decoding, {batch} at once{}", common::kv_note(model.kv_dtype()));
        let figure = Figure::new(what, *batch as f64 / seconds, "tokens/s");
        let figure = figure.beside(1e3 * seconds, "ms a step").by(model.kernels(*batch));
        Ok(figure.share(ceilings.memory_by, read / seconds / ceilings.memory))
    };
    batches.iter().map(one).collect()
}

/// The mean time of a step in which every sequence gets a token. As in the engine the next step is asked for before the
/// tokens of this one are known, where the device works beside the host.
fn seconds_a_step<B: Backend>(
    model: &Model<B>,
    batch: usize,
    params: &SamplingParams,
    contexts: Range<usize>,
) -> Result<f64> {
    let blocks = (contexts.end + 1).div_ceil(KV_BLOCK_ROWS);
    let mut caches = model.kv_caches(batch * blocks)?;
    let mut decoder = Decoder::default();
    let backend = model.backend();
    let samplers = (0..batch as u64).map(|seed| Sampler::new(SamplingParams { seed, ..params.clone() }));
    let mut samplers: Vec<Sampler> = samplers.collect::<Result<_, _>>()?;
    let of = |sequence: usize| (sequence * blocks) as u32..((sequence + 1) * blocks) as u32;
    let mut step = |context: usize, before: Option<&B::Sampled>| -> Result<B::Sampled> {
        let sequence = |i| SequenceRows { rows: 1, context, blocks: of(i).collect() };
        let described = Batch { sequences: (0..batch).map(sequence).collect() };
        let sampling: Vec<RowSampling> =
            samplers.iter_mut().map(|sampler| sampler.row_at(context + 1)).collect();
        let drawn = Some(&sampling[..]);
        let logits = match before {
            Some(sampled) => model.decode_sampled(sampled, &described, drawn, &mut caches, &mut decoder)?,
            None => model.decode(&vec![1; batch], &described, drawn, &mut caches, &mut decoder)?,
        };
        Ok(backend.sample(&logits, &sampling)?)
    };
    // The first step is captured.
    let mut sampled = step(contexts.start, None)?;
    backend.sampled_tokens(&sampled)?;
    let (start, steps) = (Instant::now(), contexts.len());
    for context in contexts {
        let next = step(context, Some(&sampled))?;
        backend.sampled_tokens(&sampled)?;
        sampled = next;
    }
    backend.sampled_tokens(&sampled)?;
    Ok(start.elapsed().as_secs_f64() / steps as f64)
}

/// What a step cannot do without: every weight once, of the head a share, and the keys and values of all contexts.
fn bytes_a_step<B: Backend>(
    model: &Model<B>,
    files: &ModelFiles,
    (batch, context): (usize, usize),
    head_share: f64,
) -> f64 {
    let (config, tensors) = (&files.config, tensors(files));
    // The embedding gives one row a token, unless it is the head too.
    let head = if config.tie_word_embeddings { "model.embed_tokens." } else { "lm_head." };
    let (kv_heads, element) = (config.num_key_value_heads, model.backend().element_size());
    let token = config.num_hidden_layers * model.kv_dtype().token_bytes(kv_heads, config.head_dim, element);
    // Of experts, those that the tokens are sent to.
    let layers = tensor_bytes(&tensors, "model.layers.");
    let unread = layout::weights_read(config, usize::MAX) - layout::weights_read(config, batch);
    let layers = layers * (1.0 - unread / layout::weights_read(config, usize::MAX));
    layers + head_share * tensor_bytes(&tensors, head) + (batch * context * token) as f64
}
