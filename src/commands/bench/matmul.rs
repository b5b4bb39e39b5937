//! `gptq bench matmul`: the products of a decoding step one by one, beside what memory and arithmetic allow.

use std::path::Path;

use anyhow::Result;
use gptq_kernels::{Backend, Batch, Norm};
use gptq_runtime::layout::{self, LinearGroup, Stage};
use gptq_runtime::model::{Model, ModelFiles, Projection};
use serde::Serialize;

use super::ceilings::Ceilings;
use super::{Workspace, first_token, median, tensor_bytes, tensors};
use crate::args::MatmulBenchArgs;
use crate::commands::common::{self, Chosen, DeviceKind};
use crate::output;

/// How often each is measured; the median counts.
const TIMES: usize = 20;

pub fn run(args: &MatmulBenchArgs) -> Result<()> {
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let report = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => measure(&cpu, DeviceKind::Cpu, args, &dir, &files)?,
        Chosen::Gpu(gpu) => measure(&gpu, DeviceKind::Gpu, args, &dir, &files)?,
    };
    match args.json {
        true => Ok(output::json(&report)?),
        false => report.print(),
    }
}

#[derive(Serialize)]
struct Report {
    title: String,
    /// Ceilings: bytes of memory, and operations, a second.
    memory: f64,
    memory_by: &'static str,
    matmul: f64,
    /// Operations that the device is asked for in a step of one token.
    launches: Option<u64>,
    rows: Vec<Row>,
}

/// One product, the mean over all layers.
#[derive(Serialize)]
struct Row {
    product: &'static str,
    tokens: usize,
    bytes: f64,
    flops: f64,
    floor_us: f64,
    measured_us: f64,
}

fn measure<B: Backend>(
    device: &B,
    kind: DeviceKind,
    args: &MatmulBenchArgs,
    dir: &Path,
    files: &ModelFiles,
) -> Result<Report> {
    let work = Workspace::new()?;
    let ceilings = Ceilings::measure(device, kind, &files.config, work.path())?;
    let model = common::load_model(device, dir)?;
    let mut rows = Vec::new();
    for tokens in &args.tokens {
        // Experts have no product of their own: what a step of them takes is in `bench decode`.
        for (place, group) in layout::layer(&files.config, 0).groups.iter().enumerate() {
            let stage = group.role.stage();
            if stage == Stage::Mixture {
                continue;
            }
            let (out, width) = group.dims();
            let weights = out * width;
            let seconds = seconds(device, &model, (place, stage), width, *tokens)?;
            let bytes = group_bytes(files, group);
            let flops = 2.0 * (tokens * weights) as f64;
            let floor = (bytes / ceilings.memory).max(flops / ceilings.matmul);
            let (product, tokens) = (stage.name(), *tokens);
            let (floor_us, measured_us) = (1e6 * floor, 1e6 * seconds);
            rows.push(Row { product, tokens, bytes, flops, floor_us, measured_us });
        }
    }
    let before = device.launches();
    first_token(&model)?;
    let launches = device.launches().zip(before).map(|(after, before)| after - before);
    let title = format!("{}, on {}", args.model, device.name());
    let Ceilings { memory, memory_by, matmul, .. } = ceilings;
    Ok(Report { title, memory, memory_by, matmul, launches, rows })
}

/// The mean time of a stage's product over all layers, whose weights are read one after the other.
fn seconds<B: Backend>(
    device: &B,
    model: &Model<B>,
    (place, stage): (usize, Stage),
    width: usize,
    tokens: usize,
) -> Result<f64> {
    let x = device.tensor((0..tokens * width).map(|i| (i % 7) as f32 - 3.0).collect(), (tokens, width))?;
    let ones = device.tensor(vec![1.0; width], (1, width))?;
    let projections: Vec<&Projection<B>> =
        model.layers().iter().filter_map(|layer| layer.projections().nth(place)).collect();
    let inputs: Vec<B::Tensor> = match stage {
        // What comes before these stores it so.
        Stage::O | Stage::Down | Stage::Mixture => {
            projections.iter().map(|p| p.ordered_input(device, &x)).collect::<std::result::Result<_, _>>()?
        }
        Stage::Qkv | Stage::GateUp => vec![x.clone(); projections.len()],
    };
    let mut step = || -> Result<B::Tensor> {
        let mut last = x.clone();
        for (projection, x) in projections.iter().zip(&inputs) {
            let norm = Norm { weight: &ones, eps: 1e-6 };
            last = match stage {
                Stage::GateUp => projection.normed_gate_up(device, x, norm, model.config.activation)?,
                Stage::Qkv => projection.normed(device, x, norm)?,
                Stage::O | Stage::Down | Stage::Mixture => projection.forward(device, x)?,
            };
        }
        Ok(last)
    };
    let layers = projections.len() as f64;
    // Where a device captures, asking for each product would be what is measured.
    let batch = Batch::fresh([tokens]);
    Ok(match device.capture(&batch, &mut step)? {
        Some(graph) => median(device, TIMES, || device.replay(&graph, &batch))?,
        None => median(device, TIMES.min(3), step)?,
    } / layers)
}

/// Bytes of a group's tensors in one layer.
fn group_bytes(files: &ModelFiles, group: &LinearGroup) -> f64 {
    let (tensors, prefix) = (tensors(files), layout::layer_prefix(0));
    group.linears.iter().map(|linear| tensor_bytes(&tensors, &format!("{prefix}{}.", linear.module))).sum()
}

impl Report {
    fn print(&self) -> Result<()> {
        say!("{}\n", self.title)?;
        let (by, memory, matmul) = (self.memory_by, self.memory / 1e9, self.matmul / 1e12);
        say!("{by} {memory:.1} GB/s, matrix product {matmul:.2} TFLOP/s")?;
        if let Some(launches) = self.launches {
            say!("{launches} kernels a token")?;
        }
        say!("\nproduct  tokens         MB      GFLOP   floor us  measured us   share")?;
        for Row { product, tokens, bytes, flops, floor_us, measured_us } in &self.rows {
            let (mb, gflop, share) = (bytes / 1e6, flops / 1e9, 100.0 * floor_us / measured_us);
            let work = format!("{product:<8} {tokens:>6} {mb:>10.2} {gflop:>10.2}");
            say!("{work} {floor_us:>10.1} {measured_us:>12.1} {share:>5.0} %")?;
        }
        Ok(())
    }
}
