//! `gptq bench cpu`: what this machine's processor can do, and how near to it quantizing, decoding and prompts come.

use std::path::Path;

use anyhow::Result;
use gptq_kernels::{Backend, Cpu, Device};
use gptq_quantizer::plan::Plan;
use gptq_quantizer::produce::Source;
use gptq_quantizer::recipe::Preset;
use gptq_runtime::sampling::SamplingParams;

use super::ceilings::Ceilings;
use super::{Figure, Workspace, decode, prefill, print, quantize};
use crate::args::CpuBenchArgs;
use crate::commands::common::{self, DeviceKind};

pub fn run(args: &CpuBenchArgs) -> Result<()> {
    let work = Workspace::new()?;
    let (name, dir) = work.model(args.model.as_deref())?;
    let device = Cpu::new();
    let files = common::open_model(&dir)?;
    let ceilings = Ceilings::measure(&device, DeviceKind::Cpu, &files.config, work.path())?;
    let mut figures = ceilings.figures();
    let artifact = match files.quant {
        Some(_) => dir.clone(),
        None => {
            let out = args.out.clone().unwrap_or(work.path().join("branches"));
            std::fs::create_dir_all(&out)?;
            figures.extend(quantized(&device, args, (name.as_str(), dir.as_path()), &out, &ceilings)?);
            out.join("main")
        }
    };
    drop(files);
    figures.extend(run_model(&device, args, &artifact, &ceilings)?);
    print(args.json, &format!("{name}, on {}", device.name()), &figures)
}

/// The phases of making the branch that decodes afterwards.
fn quantized(
    device: &Cpu,
    args: &CpuBenchArgs,
    (name, dir): (&str, &Path),
    out: &Path,
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let files = common::open_model(dir)?;
    let (random, built_in) = (args.random_tokens, args.model.is_none());
    let calibration =
        quantize::calibration(random, built_in, &args.calibration, &files, dir, DeviceKind::Cpu)?;
    let source = Source::check(name, dir, &files)?;
    let main: Vec<_> = Plan::card(Preset::Card).branches.into_iter().take(1).collect();
    quantize::measure(device, &source, &main, &calibration, out, ceilings)
}

/// Decoding and prompts.
fn run_model<B: Backend>(
    device: &B,
    args: &CpuBenchArgs,
    dir: &Path,
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let files = common::open_model(dir)?;
    let model = common::load_model(device, dir)?;
    let params = SamplingParams::greedy();
    let contexts = args.context..args.context + args.tokens;
    let mut figures = decode::measure(&model, &files, &args.batch, &params, contexts, ceilings)?;
    figures.extend(prefill::measure(&model, &files, &args.prompt, ceilings)?);
    Ok(figures)
}
