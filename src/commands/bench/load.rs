//! `gptq bench load`: from the files to the first token.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::{Backend, Batch, RowSampling, SequenceRows};

use super::{Figure, print};
use crate::args::LoadBenchArgs;
use crate::commands::common::{self, DeviceKind, OnDevice};

pub fn run(args: &LoadBenchArgs) -> Result<()> {
    let start = Instant::now();
    let dir = common::model_dir(&args.model)?;
    let files = common::open_model(&dir)?;
    let (title, figures) = common::on_device(args.device, &files.config, Measure { args, dir: &dir, start })?;
    print(args.json, &title, &figures)
}

/// The part that needs a device.
struct Measure<'a> {
    args: &'a LoadBenchArgs,
    dir: &'a Path,
    start: Instant,
}

impl OnDevice for Measure<'_> {
    type Output = (String, Vec<Figure>);

    fn run<B: Backend>(self, device: B, _: DeviceKind) -> Result<Self::Output> {
        let ready = self.start.elapsed().as_secs_f64();
        let model = common::load_model(&device, self.dir)?;
        device.synchronize()?;
        let loaded = self.start.elapsed().as_secs_f64();
        let batch = Batch { sequences: vec![SequenceRows { rows: 1, context: 0, blocks: vec![0] }] };
        let hidden = model.forward(&[1], &batch, Some(&mut model.kv_caches(1)?))?;
        device.sampled_tokens(&device.sample(&model.logits(&hidden, 0..1)?, &[RowSampling::likeliest()])?)?;
        let first = self.start.elapsed().as_secs_f64();
        let bytes: u64 = std::fs::read_dir(self.dir)?
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
        Ok((format!("{}, on {}", self.args.model, device.name()), figures))
    }
}
