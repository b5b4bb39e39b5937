//! Loads a model folder, quantized or not, and continues a text:
//! `cargo run --release --example generate -- MODEL "The river"`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use gptq_kernels::{Backend, Cpu, Cuda};
use gptq_runtime::generate::{GenerateParams, generate};
use gptq_runtime::generation_config::GenerationConfig;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::sampling::SamplingParams;
use gptq_text::Tokenizer;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompt] = &args[..] else { anyhow::bail!("usage: generate MODEL PROMPT") };
    let dir = Path::new(model);
    let files = ModelFiles::open(dir)?;
    // The first GPU, with all of its memory, where there is one.
    match Cuda::new(0, files.config.dtype, None) {
        Ok(gpu) => continue_text(Model::load(gpu, &files)?, dir, prompt),
        Err(_) => continue_text(Model::load(Cpu::new(), &files)?, dir, prompt),
    }
}

fn continue_text<B: Backend>(model: Model<B>, dir: &Path, prompt: &str) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::load(dir)?;
    let settings = GenerationConfig::read(dir)?.unwrap_or_default();
    let ends = settings.end_ids(&model.config, tokenizer.eos_id());
    let params = GenerateParams::new(80, ends, SamplingParams::greedy());
    let (mut text, mut out, mut failed) = (tokenizer.stream(true), std::io::stdout(), None);
    write!(out, "{prompt}")?;
    generate(&model, &tokenizer.encode(prompt, true)?, &params, &mut |id| {
        let written = text
            .push(id)
            .map_err(anyhow::Error::from)
            .and_then(|piece| Ok(write!(out, "{}", piece.unwrap_or_default()).and_then(|()| out.flush())?));
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    failed.map_or(Ok(()), Err)?;
    Ok(writeln!(out, "{}", text.finish()?.unwrap_or_default())?)
}
