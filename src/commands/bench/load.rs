//! `gptq bench load`: from the files to the first token.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::Backend;

use super::{Figure, first_token, print};
use crate::args::LoadBenchArgs;
use crate::commands::common::{self, Chosen};

pub fn run(args: &LoadBenchArgs) -> Result<()> {
    let start = Instant::now();
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let (device, figures) = match common::device(args.device, &files.config)? {
        Chosen::Cpu(cpu) => measure(&cpu, &dir, start)?,
        Chosen::Gpu(gpu) => measure(&gpu, &dir, start)?,
    };
    print(args.json, &format!("{}, on {device}", args.model), &figures)
}

/// The device's name, and seconds from the start on.
fn measure<B: Backend>(device: &B, dir: &Path, start: Instant) -> Result<(String, Vec<Figure>)> {
    let ready = start.elapsed().as_secs_f64();
    let model = common::load_model(device, dir)?;
    device.synchronize()?;
    let loaded = start.elapsed().as_secs_f64();
    first_token(&model)?;
    let first = start.elapsed().as_secs_f64();
    let bytes: u64 = std::fs::read_dir(dir)?
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "safetensors"))
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum();
    let figures = vec![
        Figure::new("the device is ready", ready, "s"),
        Figure::new("weights", loaded - ready, "s").rate(bytes as f64 / 1e9, "GB/s"),
        Figure::new("first token", first - loaded, "s"),
        Figure::new("all of it", first, "s"),
    ];
    Ok((device.name(), figures))
}
