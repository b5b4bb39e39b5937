//! `gptq bench`: what the program reaches on this machine, beside ceilings measured in the same run.

pub mod agreement;
pub mod cpu;
pub mod decode;
pub mod load;
pub mod matmul;
pub mod prefill;
pub mod quality;
pub mod quantize;
pub mod reference;
pub mod serve;

mod ceilings;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use gptq_kernels::{Backend, Batch, Device, RowSampling, SequenceRows};
use gptq_runtime::layout::{self, TensorSpec};
use gptq_runtime::model::{Model, ModelFiles};
use serde::Serialize;

use super::{common, demo};
use crate::output;

/// One measured figure.
#[derive(Clone, Serialize)]
struct Figure {
    what: String,
    value: f64,
    unit: &'static str,
    /// The work done per second, where the value is a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<Rate>,
    /// Share of the ceiling measured in this run, and its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    share: Option<Share>,
    /// The kernels that were measured, where the device has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<String>,
}

#[derive(Clone, Copy, Serialize)]
struct Rate {
    value: f64,
    unit: &'static str,
}

#[derive(Clone, Copy, Serialize)]
struct Share {
    of: &'static str,
    value: f64,
}

impl Figure {
    fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, unit, rate: None, share: None, kernels: None }
    }

    /// For a time: `work` of `unit` (say 1e12 FLOP as TFLOP) was done in it.
    fn rate(self, work: f64, unit: &'static str) -> Self {
        let value = work / self.value;
        self.beside(value, unit)
    }

    /// Another way to say the same.
    fn beside(self, value: f64, unit: &'static str) -> Self {
        Self { rate: Some(Rate { value, unit }), ..self }
    }

    fn by(self, kernels: String) -> Self {
        Self { kernels: Some(kernels), ..self }
    }

    fn share(self, of: &'static str, value: f64) -> Self {
        Self { share: Some(Share { of, value }), ..self }
    }
}

/// For people, or for a script.
fn print(json: bool, title: &str, figures: &[Figure]) -> Result<()> {
    if json {
        return Ok(output::json(&figures)?);
    }
    say!("{title}\n")?;
    for figure in figures {
        let rate = figure.rate.map_or(String::new(), |r| format!("{:>9.2} {}", r.value, r.unit));
        let share = figure.share.map_or(String::new(), |s| format!("{:>6.1} % of {}", 100.0 * s.value, s.of));
        let line =
            format!("{:<36} {:>10.3} {:<9} {rate:<19} {share}", figure.what, figure.value, figure.unit);
        say!("{}", line.trim_end())?;
        if let Some(kernels) = &figure.kernels {
            say!("    by {kernels}")?;
        }
    }
    Ok(())
}

/// All tensors of a model, as its files have them.
fn tensors(files: &ModelFiles) -> Vec<TensorSpec> {
    match &files.quant {
        Some(quant) => layout::artifact_tensors(&files.config, quant, false),
        None => layout::checkpoint_tensors(&files.config),
    }
}

/// Bytes of the tensors whose names start so.
fn tensor_bytes(tensors: &[TensorSpec], prefix: &str) -> f64 {
    tensors.iter().filter(|spec| spec.name.starts_with(prefix)).map(|spec| spec.bytes() as f64).sum()
}

/// The median time of `work`, in seconds, after a first time that does not count.
fn median<D: Device, T, E>(device: &D, times: usize, mut work: impl FnMut() -> Result<T, E>) -> Result<f64>
where
    anyhow::Error: From<E>,
{
    work()?;
    device.synchronize()?;
    let mut seconds = Vec::with_capacity(times);
    for _ in 0..times {
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(middle(seconds))
}

/// The median of some values.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What a model makes of a text of one token.
fn first_token<B: Backend>(model: &Model<B>) -> Result<()> {
    let (device, sequence) = (model.backend(), SequenceRows { rows: 1, context: 0, blocks: vec![0] });
    let batch = Batch { sequences: vec![sequence] };
    let hidden = model.forward(&[1], &batch, Some(&mut model.kv_caches(1)?))?;
    let sampled = device.sample(&model.logits(&hidden, 0..1)?, &[RowSampling::likeliest()])?;
    device.sampled_tokens(&sampled)?;
    Ok(())
}

/// A folder of this process's own, removed when it is dropped.
struct Workspace(PathBuf);

impl Workspace {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("gptq-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// The name and the folder of the model that was asked for, or of the built-in one, which is laid out here.
    fn model(&self, asked: Option<&str>) -> Result<(String, PathBuf)> {
        let name = asked.unwrap_or("demo4m").to_owned();
        let dir = match asked {
            Some(model) => common::model_dir(model)?,
            None => self.0.join(&name),
        };
        if asked.is_none() {
            demo::write_model(&dir)?;
        }
        Ok((name, dir))
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What cannot be removed is a temporary folder that the system clears.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
