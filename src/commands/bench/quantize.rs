//! `gptq bench quantize`: the phases of quantization beside their floors.

use std::path::Path;

use anyhow::Result;
use gptq_kernels::Backend;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::plan::{Branch, Plan};
use gptq_quantizer::produce::{Job, Source};
use gptq_quantizer::recipe::{Named, Target};
use gptq_quantizer::record::{CalibrationRecord, QuantizeLog};
use gptq_quantizer::sequential::ActivationCache;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout::{self, LinearGroup, Mlp, Role};
use gptq_runtime::model::ModelFiles;

use super::ceilings::{self, Ceilings};
use super::{Figure, Workspace, print, tensor_bytes};
use crate::args::{CalibrationArgs, QuantizeBenchArgs};
use crate::commands::common::{self, Calibration, Chosen, DeviceKind};
use crate::commands::{demo, quantize};

pub fn run(args: &QuantizeBenchArgs) -> Result<()> {
    let work = Workspace::new()?;
    let (name, dir) = work.model(args.model.as_deref())?;
    let files = common::open_model(&dir)?;
    let out = args.out.clone().unwrap_or(work.path().join("branches"));
    std::fs::create_dir_all(&out)?;
    let model = (name.as_str(), dir.as_path(), &files);
    let (title, figures) = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => report(&cpu, DeviceKind::Cpu, args, model, &out)?,
        Chosen::Gpu(gpu) => report(&gpu, DeviceKind::Gpu, args, model, &out)?,
    };
    print(args.json, &title, &figures)
}

/// A title, and what was measured.
fn report<B: Backend>(
    device: &B,
    kind: DeviceKind,
    args: &QuantizeBenchArgs,
    (name, dir, files): (&str, &Path, &ModelFiles),
    out: &Path,
) -> Result<(String, Vec<Figure>)> {
    let built_in = args.model.is_none();
    let calibration = calibration(args.random_tokens, built_in, &args.calibration, files, dir, kind)?;
    let ceilings = Ceilings::measure(device, kind, &files.config, out)?;
    let mut figures = ceilings.figures();
    let count = if args.all_branches { usize::MAX } else { 1 };
    let branches: Vec<_> = Plan::card(args.preset).branches.into_iter().take(count).collect();
    let source = Source::check(name, dir, files)?;
    figures.extend(measure(device, &source, &branches, &calibration, out, &ceilings)?);
    let CalibrationRecord { samples, seq_len, .. } = calibration.record;
    let title = format!("{samples} x {seq_len} tokens, damp 0.1, act-order, preset {}", args.preset.name());
    Ok((format!("{title}, on {}", device.name()), figures))
}

/// What the checkpoint is calibrated on.
pub(super) fn calibration(
    random_tokens: bool,
    built_in: bool,
    args: &CalibrationArgs,
    files: &ModelFiles,
    dir: &Path,
    kind: DeviceKind,
) -> Result<Calibration> {
    match (random_tokens, built_in) {
        (true, _) => Ok(Calibration::random(args, kind, files.config.vocab_size)),
        (false, true) => Calibration::from_dataset(&demo::CALIBRATION, &demo::train_text(), dir, kind),
        (false, false) => Calibration::load(args, dir, kind),
    }
}

/// Makes branches of a checkpoint in `out`, and says where the time went.
pub(super) fn measure<B: Backend>(
    device: &B,
    source: &Source,
    branches: &[Branch],
    calibration: &Calibration,
    out: &Path,
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let config = &source.files().config;
    let mut figures = ceilings::operations(device, config, calibration.record.seq_len, ceilings)?;
    for branch in branches {
        let log = make(device, branch, source, calibration, &out.join(&branch.name))?;
        figures.extend(phases(branch, &log, config, &calibration.sequences, ceilings));
    }
    Ok(figures)
}

fn make<B: Backend>(
    device: &B,
    branch: &Branch,
    source: &Source,
    calibration: &Calibration,
    out: &Path,
) -> Result<QuantizeLog> {
    let params = branch.params();
    let activations =
        ActivationCache::embed(device, source.files(), &calibration.sequences, params.layout())?;
    let job = Job {
        calibration: Some(&calibration.record),
        mode: OutMode::Force,
        ..Job::new(source, &params, &calibration.sequences, out)
    };
    quantize::make(device, &job, activations, &branch.name)
}

/// Seconds of each phase, its rate, and how near that comes to the ceiling.
fn phases(
    branch: &Branch,
    log: &QuantizeLog,
    config: &ModelConfig,
    sequences: &[Vec<u32>],
    ceilings: &Ceilings,
) -> Vec<Figure> {
    let work = Work::of(config, sequences, branch.params().recipe.target);
    let quant = branch.quant_config();
    let hessians = if work.streams > 1.0 { "Hessians (half) and differences" } else { "Hessians (half)" };
    let branch = &branch.name;
    let tera = |what: &str, seconds: f64, flops: f64| {
        Figure::new(format!("{branch}: {what}"), seconds, "s").rate(flops / 1e12, "TFLOP/s")
    };
    let product = |what, seconds, flops: f64| {
        tera(what, seconds, flops).share("the matrix product", flops / seconds / ceilings.matmul)
    };
    let bytes = |what: &str, seconds: f64, bytes: f64| {
        Figure::new(format!("{branch}: {what}"), seconds, "s").rate(bytes / 1e9, "GB/s")
    };
    let seconds = log.phases();
    let written = tensor_bytes(&layout::artifact_tensors(config, &quant, true), "model.layers.");
    let mut figures = vec![
        product("forward", seconds.forward, work.forward),
        product(hessians, seconds.hessian, work.hessian),
        tera("factors", seconds.factor, work.factor),
        Figure::new(format!("{branch}: targets"), seconds.target, "s"),
        tera("sweeps", seconds.sweep, work.sweep),
        Figure::new(format!("{branch}: refinement"), seconds.refine, "s"),
        Figure::new(format!("{branch}: packing"), seconds.pack, "s"),
        Figure::new(format!("{branch}: waiting"), seconds.wait, "s"),
        bytes("reading, beside", seconds.read, work.read),
        bytes("writing, beside", seconds.write, written)
            .share("writing to disk", written / seconds.write / ceilings.disk),
        Figure::new(format!("{branch}: in all"), log.seconds, "s"),
    ];
    if let Some(peak) = log.peak_memory {
        figures.push(Figure::new(format!("{branch}: most GPU memory"), peak as f64 / 1e9, "GB"));
    }
    figures
}

/// Arithmetic and bytes of one branch.
struct Work {
    forward: f64,
    /// Of Hessians lower triangles alone; products with what a second stream has are whole.
    hessian: f64,
    /// A Cholesky factor and its inverse.
    factor: f64,
    /// Errors moved to the columns after their block.
    sweep: f64,
    read: f64,
    streams: f64,
}

impl Work {
    fn of(config: &ModelConfig, sequences: &[Vec<u32>], target: Target) -> Self {
        let streams = if target == Target::None { 1.0 } else { 2.0 };
        let tokens: f64 = sequences.iter().map(|s| s.len() as f64).sum();
        let layers = config.num_hidden_layers as f64;
        let groups: Vec<_> =
            (0..config.num_hidden_layers).flat_map(|index| layout::layer(config, index).groups).collect();
        let dims: Vec<(f64, f64)> =
            groups.iter().map(LinearGroup::dims).map(|(n, k)| (n as f64, k as f64)).collect();
        let weights = layout::active_weights(config);
        // The last layer's down projection is solved but never run.
        let last = dims.last().map_or(0.0, |(n, k)| n * k);
        let attention: f64 = sequences.iter().map(|s| ceilings::attention_flops(config, s.len())).sum();
        // A mixture's experts see a part of the tokens each, and have no residual target.
        let pair = |group: &LinearGroup| -> f64 {
            let (out, k) = (group.dims().0 as f64, group.dims().1 as f64);
            match target {
                Target::None => 0.0,
                Target::Residual if matches!(group.role, Role::O | Role::Down(Mlp::Whole)) => 2.0 * out * k,
                Target::Residual | Target::Asymmetric => 2.0 * k * k,
            }
        };
        let pairs: f64 = groups.iter().map(pair).sum();
        let per_group = |f: fn(f64) -> f64| dims.iter().map(|(_, k)| f(*k)).sum::<f64>();
        Self {
            forward: streams * (2.0 * tokens * (weights - last) + attention * layers),
            hessian: tokens * (per_group(|k| k * k) + pairs),
            factor: per_group(|k| 2.0 / 3.0 * k.powi(3)),
            sweep: dims.iter().map(|(n, k)| n * k * k).sum(),
            read: 2.0 * dims.iter().map(|(n, k)| n * k).sum::<f64>(),
            streams,
        }
    }
}
