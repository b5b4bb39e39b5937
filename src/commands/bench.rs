//! `gptq bench cpu`: the phases of quantization and the speed of decoding, beside this machine's own ceilings.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::{Batch, Cpu, Device};
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::gptq::{GptqParams, Method};
use gptq_quantizer::plan::Plan;
use gptq_quantizer::produce::Job;
use gptq_quantizer::record::{LayerRecord, QuantizeLog};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::generate::{GenerateParams, generate};
use gptq_runtime::layout;
use gptq_runtime::model::ModelFiles;
use gptq_runtime::sampling::SamplingParams;
use serde::Serialize;

use super::common::{self, Calibration, DeviceKind};
use super::{demo, eval, quantize};
use crate::args::BenchCpuArgs;
use crate::output;

/// Tokens of the decoding measurement.
const DECODE_TOKENS: usize = 64;

/// One measured figure beside what the machine could do.
#[derive(Serialize)]
struct Figure {
    what: &'static str,
    value: f64,
    unit: &'static str,
    /// Share of the ceiling measured in this run, where there is one.
    share_of_ceiling: Option<f64>,
}

pub fn run(args: &BenchCpuArgs) -> Result<()> {
    let work = tempdir()?;
    let built_in = work.join("demo4m");
    let (dir, calibration) = match &args.model {
        Some(model) => {
            let dir = common::model_dir(model)?;
            let calibration = Calibration::load(&args.calibration, &dir, DeviceKind::Cpu)?;
            (dir, calibration)
        }
        None => {
            demo::write_model(&built_in)?;
            let calibration = Calibration::from_dataset(
                &demo::CALIBRATION,
                &demo::train_text()?,
                &built_in,
                DeviceKind::Cpu,
            )?;
            (built_in, calibration)
        }
    };
    let device = Cpu::new();
    let ceilings = Ceilings::measure(&device)?;
    let files = ModelFiles::open(&dir)?;
    let main = Plan::card().branches.into_iter().next().map(|branch| branch.quant_config());
    let quant = main.ok_or_else(|| anyhow::anyhow!("the plan is empty"))?;
    let params = GptqParams { quant, method: Method::Gptq, mse: false, f16_scales: true };
    let out = work.join("main");
    let job = Job {
        model: args.model.as_deref().unwrap_or("demo4m"),
        source: &dir,
        files: &files,
        params: &params,
        zero_bias: true,
        sequences: &calibration.sequences,
        calibration: Some(&calibration.record),
        out: &out,
        mode: OutMode::Force,
        max_shard_size: None,
    };
    let log = quantize::make(&device, &job, "quantizing")?;
    let mut figures = ceilings.figures();
    figures.extend(phases(&log, &files.config, &calibration.sequences, &ceilings));
    figures.push(decoding(&device, &out, &ceilings)?);
    std::fs::remove_dir_all(&work)?;
    match args.json {
        true => output::json(&figures)?,
        false => print(&device, job.model, &calibration, &figures)?,
    }
    Ok(())
}

/// What this machine can do at best, in the kinds of work that count here.
struct Ceilings {
    /// Product of two square f32 matrices that fit the caches.
    gemm_flops: f64,
    /// Sum of an array far larger than the caches.
    read_bytes: f64,
}

impl Ceilings {
    fn measure(device: &Cpu) -> Result<Self> {
        use gptq_kernels::MatMul;
        let size = 2048;
        let x = device.tensor(vec![0.5; size * size], (size, size))?;
        let w = device.weight_from_f32(vec![0.25; size * size], (size, size), None)?;
        let gemm = best_of(5, || device.matmul(&x, &w).map(drop))?;
        let array = vec![1u64; 64 << 20];
        let read = best_of(5, || {
            use rayon::prelude::*;
            std::hint::black_box(array.par_chunks(1 << 16).map(|c| c.iter().sum::<u64>()).sum::<u64>());
            Ok::<(), anyhow::Error>(())
        })?;
        Ok(Self {
            gemm_flops: 2.0 * (size as f64).powi(3) / gemm,
            read_bytes: 8.0 * array.len() as f64 / read,
        })
    }

    fn figures(&self) -> Vec<Figure> {
        let figure = |what, value, unit| Figure { what, value, unit, share_of_ceiling: None };
        vec![
            figure("ceiling: f32 matrix product", self.gemm_flops / 1e9, "GFLOP/s"),
            figure("ceiling: reading memory", self.read_bytes / 1e9, "GB/s"),
        ]
    }
}

fn best_of<E>(times: usize, mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut best = f64::INFINITY;
    for _ in 0..times {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Seconds of each phase, and how near its arithmetic came to the product's ceiling.
fn phases(
    log: &QuantizeLog,
    config: &ModelConfig,
    sequences: &[Vec<u32>],
    ceilings: &Ceilings,
) -> Vec<Figure> {
    let tokens: f64 = sequences.iter().map(|s| s.len() as f64).sum();
    let linears = layout::linears(config);
    let weights: f64 = linears.iter().map(|l| (l.in_features * l.out_features) as f64).sum();
    let layers = config.num_hidden_layers as f64;
    let width = (config.num_attention_heads * config.head_dim) as f64;
    let attention: f64 = sequences.iter().map(|s| 2.0 * (s.len() as f64).powi(2) * width).sum();
    // The last layer's down projection is solved but never run.
    let last = linears.last().map_or(0.0, |l| (l.in_features * l.out_features) as f64);
    let forward = 2.0 * tokens * (weights * layers - last) + attention * layers;
    let widths =
        [config.hidden_size as f64, width, config.hidden_size as f64, config.intermediate_size as f64];
    let hessian = widths.iter().map(|k| tokens * k * k).sum::<f64>() * layers;
    let seconds = |phase: fn(&LayerRecord) -> f64| log.layers.iter().map(phase).sum::<f64>();
    let figure = |what, value: f64, work: Option<f64>| Figure {
        what,
        value,
        unit: "s",
        share_of_ceiling: work.map(|flops| flops / value / ceilings.gemm_flops),
    };
    vec![
        figure("forward", seconds(|l| l.forward_seconds), Some(forward)),
        figure("Hessians (lower triangles)", seconds(|l| l.hessian_seconds), Some(hessian)),
        figure("factors", seconds(|l| l.factor_seconds), None),
        figure("sweeps", seconds(|l| l.sweep_seconds), None),
        figure("writing", seconds(|l| l.write_seconds), None),
        figure("quantization in all", log.seconds, None),
    ]
}

/// Tokens per second of one sequence, and the share of the memory's speed that reading the weights makes up.
fn decoding(device: &Cpu, dir: &std::path::Path, ceilings: &Ceilings) -> Result<Figure> {
    let model = eval::load(device, dir)?;
    let sampling =
        SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0 };
    let params = GenerateParams { max_new_tokens: DECODE_TOKENS, eos_token_ids: Vec::new(), sampling };
    model.forward(&[1], &Batch::fresh([1]), None)?;
    let start = Instant::now();
    generate(&model, &[1], &params, &mut |_| ControlFlow::Continue(()))?;
    let rate = DECODE_TOKENS as f64 / start.elapsed().as_secs_f64();
    let config = &model.config;
    let linears: usize = layout::linears(config).iter().map(|l| l.in_features * l.out_features).sum();
    // Half a byte a code in the layers, two bytes an element in the head.
    let bytes = linears as f64 * config.num_hidden_layers as f64 / 2.0
        + 2.0 * (config.vocab_size * config.hidden_size) as f64;
    let share = Some(rate * bytes / ceilings.read_bytes);
    Ok(Figure {
        what: "decoding, one sequence, 4 bits",
        value: rate,
        unit: "tokens/s",
        share_of_ceiling: share,
    })
}

fn print(device: &Cpu, model: &str, calibration: &Calibration, figures: &[Figure]) -> Result<()> {
    let c = &calibration.record;
    output::line(format_args!(
        "{model}, 4-bit 128g act-order, {} x {} tokens, {}\n",
        c.samples,
        c.seq_len,
        device.name()
    ))?;
    for figure in figures {
        let share =
            figure.share_of_ceiling.map_or(String::new(), |s| format!("{:>6.1} % of the ceiling", 100.0 * s));
        output::line(format_args!("{:<34} {:>10.2} {:<9} {share}", figure.what, figure.value, figure.unit))?;
    }
    Ok(())
}

/// A folder of this process's own.
fn tempdir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("gptq-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
