//! `gptq quantize`

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result};
use gptq_kernels::{Backend, Memory};
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::card;
use gptq_quantizer::engines::{self, Facts, Place};
use gptq_quantizer::gptq::{GptqParams, Method};
use gptq_quantizer::produce::{self, Event, Job, Source, produce};
use gptq_quantizer::record::{CalibrationRecord, LinearRecord, QuantizeLog};
use gptq_quantizer::sequential::{ActivationCache, Phases, Placement};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout;
use gptq_runtime::model::ModelFiles;
use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};

use super::common::{self, Calibration, Chosen, DeviceKind};
use super::eval::Protocol;
use super::measurement::{self, Measurement};
use crate::args::{FormatArg, JoinArg, MethodArg, OutputArgs, QuantizeArgs};
use crate::output;
use crate::progress::Progress;
use crate::stop;

/// Window of the measurement after quantizing; the paper's.
const EVAL_CTX: usize = 2048;

pub fn run(args: &QuantizeArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let params = params(args)?;
    produce::check_settings(&files, &params)?;
    let log = match common::device(args.output.device, &files.config)? {
        Chosen::Cpu(cpu) => quantize(&cpu, DeviceKind::Cpu, args, (&dir, &files), &params),
        Chosen::Gpu(gpu) => quantize(&gpu, DeviceKind::Gpu, args, (&dir, &files), &params),
    }
    .map_err(stop::advise)?;
    match args.output.json {
        true => output::json(&log)?,
        false => {
            print_summary(&log, &args.out)?;
            let facts = Facts::of_settings(&files.config, &params.quant);
            for line in engines::advice(&facts, Place::Flags) {
                say!("{line}")?;
            }
        }
    }
    Ok(())
}

fn quantize<B: Backend>(
    device: &B,
    kind: DeviceKind,
    args: &QuantizeArgs,
    (dir, files): (&Path, &ModelFiles),
    params: &GptqParams,
) -> Result<QuantizeLog> {
    let calibration = match params.method {
        Method::Gptq => Some(Calibration::load(&args.calibration, dir, kind)?),
        Method::Rtn => None,
    };
    let measuring = match &args.eval_dataset {
        Some(spec) => Some(measurement(spec, dir)?.begin(device, files, dir)?),
        None => None,
    };
    let source = Source::check(&args.model, dir, files)?;
    let job = Job {
        source: &source,
        params,
        zero_bias: !args.no_bias,
        sequences: calibration.as_ref().map_or(&[], |c| &c.sequences),
        calibration: calibration.as_ref().map(|c| &c.record),
        out: &args.out,
        mode: args.output.mode(),
        max_shard_size: args.output.max_shard_size,
        stop: stop::on_signals()?,
    };
    let activations = ActivationCache::embed(device, files, job.sequences, params.layout())?;
    let mut log = make(device, &job, activations, "quantizing")?;
    if let Some(measuring) = measuring {
        measurement::complete(&measuring, "evaluating", &args.out, &mut log)?;
    }
    Ok(log)
}

/// Makes one artifact with progress on stderr.
pub fn make<B: Backend>(
    device: &B,
    job: &Job,
    activations: ActivationCache<B>,
    title: &str,
) -> Result<QuantizeLog> {
    let groups = groups(&job.source.files().config);
    let mut progress = Progress::start(title, groups.iter().sum::<usize>() as u64);
    if let Some(c) = job.calibration {
        let CalibrationRecord { samples, seq_len, dataset, sampling, seed, .. } = c;
        let text =
            format!("{samples} sequences of {seq_len} tokens from {dataset} ({sampling}, seed {seed})");
        progress.note(&format!("{text} on {}", device.name()));
    }
    let placement = activations.placement();
    if device.memory()?.is_some() && placement.chunks > 0 {
        progress.note(&describe(&placement));
    }
    let (mut pace, mut told) = (Pace::new(job), false);
    let log = produce(device, job, activations, &mut |event| match event {
        Event::Finished => {
            progress.note(&format!("{} is there already, made with the same settings", job.out.display()));
        }
        Event::Restoring { layer } => {
            progress.message(&format!("layer {layer} is done already"));
            progress.advance(groups[layer] as u64);
        }
        Event::Solving { layer, group } => {
            if job.stop.load(Ordering::Relaxed) && !std::mem::replace(&mut told, true) {
                progress
                    .note(&format!("stopping once layer {layer} is written; a second signal stops at once"));
            }
            let memory = device.memory().ok().flatten();
            progress.message(&format!("layer {layer}, {:<7} {}", group.name(), pace.describe(memory)));
            progress.advance(1);
            pace.layers += 1.0 / groups[layer] as f64;
        }
        Event::Done { layer, loss } => {
            tracing::info!("layer {layer}: loss {loss:.4}");
            pace.loss = Some(loss);
        }
    })?;
    Ok(log)
}

/// Groups of linears of each layer.
fn groups(config: &ModelConfig) -> Vec<usize> {
    (0..config.num_hidden_layers).map(|index| layout::layer(config, index).groups.len()).collect()
}

/// Where the activations are.
fn describe(placement: &Placement) -> String {
    let Placement { chunks, on_device, bytes } = *placement;
    let gigabytes = bytes as f64 / 1e9;
    match chunks - on_device {
        0 => format!("activations: {gigabytes:.1} GB, all on the GPU"),
        away => format!("activations: {gigabytes:.1} GB, {away} of {chunks} chunks through host memory"),
    }
}

/// How fast a run goes, for people.
struct Pace {
    started: Instant,
    tokens: usize,
    /// Begun, parts of one included.
    layers: f64,
    /// Of the last layer.
    loss: Option<f64>,
}

impl Pace {
    fn new(job: &Job) -> Self {
        let tokens = job.sequences.iter().map(Vec::len).sum();
        Self { started: Instant::now(), tokens, layers: 0.0, loss: None }
    }

    /// Calibration tokens per second through a layer, the last layer's loss, the device's memory.
    fn describe(&self, memory: Option<Memory>) -> String {
        let mut parts = Vec::new();
        if self.layers > 0.0 && self.tokens > 0 {
            let rate = self.tokens as f64 * self.layers / self.started.elapsed().as_secs_f64();
            parts.push(format!("{:.0}k tokens/s a layer", rate / 1e3));
        }
        parts.extend(self.loss.map(|loss| format!("loss {loss:.2}")));
        parts.extend(memory.map(|memory| {
            format!("{:.1} of {:.1} GB", memory.used as f64 / 1e9, memory.available as f64 / 1e9)
        }));
        parts.join(", ")
    }
}

/// What `--eval-dataset` asks for, by the paper's protocol.
pub fn measurement(spec: &str, model_dir: &Path) -> Result<Measurement> {
    let dataset = common::dataset(spec, None, model_dir).with_context(|| format!("data set {spec}"))?;
    Ok(Measurement { dataset, protocol: Protocol { join: JoinArg::Paper, ctx: EVAL_CTX, max_windows: None } })
}

fn params(args: &QuantizeArgs) -> Result<GptqParams> {
    let quant = QuantConfig {
        bits: args.bits,
        group_size: args.group_size.0,
        damp_percent: args.damp_percent,
        sym: !args.asym,
        true_sequential: true,
        format: match args.checkpoint_format {
            FormatArg::Gptq => CheckpointFormat::Gptq,
            FormatArg::GptqV2 => CheckpointFormat::GptqV2,
        },
        ..QuantConfig::default()
    };
    Ok(match args.method {
        MethodArg::Gptq => GptqParams::new(quant, Method::Gptq, args.recipe.recipe()),
        MethodArg::Rtn => GptqParams::new(quant, Method::Rtn, args.recipe.nearest()?),
    })
}

/// Where the time went, and how much of the device's memory.
fn phase_line(log: &QuantizeLog) -> String {
    let peak = log
        .peak_memory
        .map_or(String::new(), |bytes| format!(", at most {:.1} GB on the GPU", bytes as f64 / 1e9));
    let Phases { forward, hessian, factor, target, sweep, refine, pack, wait, read, write } = log.phases();
    format!(
        "forward {forward:.1} s, Hessians {hessian:.1} s, factors {factor:.1} s, targets {target:.1} s, \
         sweeps {sweep:.1} s, refinement {refine:.1} s, packing {pack:.1} s, waiting {wait:.1} s \
         (reading {read:.1} s and writing {write:.1} s beside), in all {:.1} s{peak}",
        log.seconds
    )
}

fn print_summary(log: &QuantizeLog, out: &Path) -> Result<()> {
    say!("{:>5}  {:<18} {:>14} {:>8}", "layer", "linear", "loss", "damp")?;
    for layer in &log.layers {
        // Those of experts are in the log.
        for linear in layer.linears.iter().filter(|linear| !linear.module.contains(".experts.")) {
            let kept = linear.held_out.as_ref().map_or(String::new(), |verdict| {
                let kept = [(verdict.takes_target(), "target"), (verdict.takes_refinement(), "refined")];
                kept.iter().filter(|(kept, _)| *kept).map(|(_, what)| format!("  {what}")).collect()
            });
            let LinearRecord { module, loss, damp_percent, .. } = linear;
            say!("{:>5}  {module:<18} {loss:>14.6} {damp_percent:>8}{kept}", layer.layer)?;
        }
    }
    say!("\n{}", phase_line(log))?;
    if let Some(line) = card::experts_line(log) {
        say!("{line}")?;
    }
    for (layer, linear) in log.raised_damp() {
        let (module, needed) = (&linear.module, linear.damp_percent);
        say!("layer {layer}, {module}: needed damp_percent {needed} instead of {}", log.damp_percent)?;
    }
    if let Some(held_out) = &log.held_out {
        say!(
            "KL divergence {:.5} nats a token from the checkpoint, top-1 agreement {:.2} %, on {} calibration sequences \
             that were held out ({} tokens)",
            held_out.kl_divergence,
            100.0 * held_out.top1_agreement,
            held_out.sequences,
            held_out.tokens
        )?;
    }
    if let Some(e) = &log.evaluation {
        say!(
            "perplexity {:.4} on {} ({} windows of {})",
            e.perplexity,
            e.protocol.dataset,
            e.protocol.windows,
            e.protocol.ctx
        )?;
    }
    say!("total loss {:.4}\nwritten to {}", log.total_loss(), out.display())?;
    Ok(())
}

impl OutputArgs {
    pub fn mode(&self) -> OutMode {
        match (self.resume, self.force) {
            (true, true) => OutMode::ResumeOrForce,
            (true, false) => OutMode::Resume,
            (false, true) => OutMode::Force,
            (false, false) => OutMode::New,
        }
    }
}
