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
use gptq_kernels::Device;
use gptq_runtime::layout::TensorSpec;
use serde::Serialize;

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
        Self { rate: Some(Rate { value: work / self.value, unit }), ..self }
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
    output::line(format_args!("{title}\n"))?;
    for figure in figures {
        let rate = figure.rate.map_or(String::new(), |r| format!("{:>9.2} {}", r.value, r.unit));
        let share = figure.share.map_or(String::new(), |s| format!("{:>6.1} % of {}", 100.0 * s.value, s.of));
        let line =
            format!("{:<36} {:>10.3} {:<9} {rate:<19} {share}", figure.what, figure.value, figure.unit);
        output::line(format_args!("{}", line.trim_end()))?;
        if let Some(kernels) = &figure.kernels {
            output::line(format_args!("    by {kernels}"))?;
        }
    }
    Ok(())
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
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[times / 2])
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
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What cannot be removed is a temporary folder that the system clears.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
