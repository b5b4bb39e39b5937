//! `gptq bench decode`: tokens per second of one sequence.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::Backend;
use gptq_runtime::generate::{GenerateParams, generate};
use gptq_runtime::layout;
use gptq_runtime::model::ModelFiles;
use gptq_runtime::sampling::SamplingParams;

use super::ceilings::Ceilings;
use super::{Figure, Workspace, print, tensor_bytes};
use crate::args::DecodeBenchArgs;
use crate::commands::common::{self, DeviceKind, OnDevice};
use crate::commands::eval;
use crate::output;

pub fn run(args: &DecodeBenchArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let files = ModelFiles::open(&dir)?;
    let (title, figures) =
        common::on_device(args.device, &files.config, Measure { args, dir: &dir, files: &files })?;
    match args.json {
        true => Ok(output::json(&figures)?),
        false => print(&title, &figures),
    }
}

/// The part that needs a device.
struct Measure<'a> {
    args: &'a DecodeBenchArgs,
    dir: &'a Path,
    files: &'a ModelFiles,
}

impl OnDevice for Measure<'_> {
    type Output = (String, Vec<Figure>);

    fn run<B: Backend>(self, device: B, kind: DeviceKind) -> Result<Self::Output> {
        let Self { args, dir, files } = self;
        let work = Workspace::new()?;
        let ceilings = Ceilings::measure(&device, kind, &files.config, work.path())?;
        let model = eval::load(&device, dir)?;
        let sampling =
            SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0 };
        let params = GenerateParams { max_new_tokens: args.tokens, eos_token_ids: Vec::new(), sampling };
        let warm = GenerateParams { max_new_tokens: 2, ..params.clone() };
        generate(&model, &[1], &warm, &mut |_| ControlFlow::Continue(()))?;
        let start = Instant::now();
        generate(&model, &[1], &params, &mut |_| ControlFlow::Continue(()))?;
        let rate = args.tokens as f64 / start.elapsed().as_secs_f64();
        let tensors = match &files.quant {
            Some(quant) => layout::artifact_tensors(&files.config, quant, false),
            None => layout::checkpoint_tensors(&files.config),
        };
        // The embedding gives one row a token, unless it is the head too.
        let head = if files.config.tie_word_embeddings { "model.embed_tokens." } else { "lm_head." };
        let bytes = tensor_bytes(&tensors, "model.layers.") + tensor_bytes(&tensors, head);
        let mut figures = ceilings.figures();
        let share = rate * bytes / ceilings.copy;
        figures.push(Figure::new("decoding, one sequence", rate, "tokens/s").share("the copy", share));
        Ok((format!("{}, {} tokens, on {}", args.model, args.tokens, device.name()), figures))
    }
}
