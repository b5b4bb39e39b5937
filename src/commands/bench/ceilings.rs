//! What this machine can do at best, in the kinds of work that count here.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use gptq_kernels::{AttentionShape, Backend, Batch, ReadMemory};
use gptq_runtime::config::ModelConfig;

use super::{Figure, median, middle};
use crate::commands::common::DeviceKind;

/// How often each is measured; the median counts.
const TIMES: usize = 5;

/// Copies in memory that are measured as one.
const COPIES: usize = 16;

/// Bytes that the CPU reads, beyond any cache, and how often in a row.
const READ: usize = 512 << 20;
const PASSES: usize = 4;

/// Rows and columns of a product that is large for a CPU: what a small model's shapes reach is no ceiling.
const LARGE: usize = 2048;

/// Rates per second.
pub struct Ceilings {
    /// Product of activations and a dense weight, in the compute type.
    pub matmul: f64,
    /// Bytes of memory: those that a GPU's copy reads and writes, those that all cores of a CPU read.
    pub memory: f64,
    /// What that was measured by.
    pub memory_by: &'static str,
    /// Bytes between host and device, to it and from it; none where they share memory.
    pub bus: Option<[f64; 2]>,
    /// Bytes written to the output's disk and synced.
    pub disk: f64,
}

impl Ceilings {
    pub fn measure<B: Backend>(
        device: &B,
        kind: DeviceKind,
        config: &ModelConfig,
        out: &Path,
    ) -> Result<Self> {
        let (k, n) = (config.hidden_size, config.intermediate_size);
        let (rows, k, n) = match kind {
            DeviceKind::Gpu => (8192, k, n),
            DeviceKind::Cpu => (LARGE, k.max(LARGE), n.max(LARGE)),
        };
        let x = device.tensor(values(rows * k), (rows, k))?;
        let w = device.weight_from_f32(values(n * k), (n, k), None)?;
        let seconds = median(device, TIMES, || device.matmul(&x, &w))?;
        let matmul = 2.0 * (rows * k * n) as f64 / seconds;
        drop((x, w));
        let (memory, memory_by, bus) = match kind {
            DeviceKind::Cpu => (read(), "reading memory", None),
            DeviceKind::Gpu => copies(device, rows).map(|(copy, bus)| (copy, "the copy", Some(bus)))?,
        };
        Ok(Self { matmul, memory, memory_by, bus, disk: disk(out, kind)? })
    }

    pub fn figures(&self) -> Vec<Figure> {
        let mut figures = vec![
            Figure::new("ceiling: matrix product", self.matmul / 1e12, "TFLOP/s"),
            Figure::new(format!("ceiling: {}", self.memory_by), self.memory / 1e9, "GB/s"),
            Figure::new("ceiling: writing to disk", self.disk / 1e9, "GB/s"),
        ];
        if let Some([up, _]) = self.bus {
            figures.push(Figure::new("ceiling: host to device", up / 1e9, "GB/s"));
        }
        figures
    }
}

/// The product of [`Ceilings::matmul`] again and again for a second, after another second of the same: a GPU at its power
/// limit lowers its clock, and what takes longer than some products is to be compared with this.
pub fn sustained_product<B: Backend>(
    device: &B,
    config: &ModelConfig,
    ceilings: &Ceilings,
) -> Result<Figure> {
    let (rows, k, n) = (8192, config.hidden_size, config.intermediate_size);
    let x = device.tensor(values(rows * k), (rows, k))?;
    let w = device.weight_from_f32(values(n * k), (n, k), None)?;
    let flops = 2.0 * (rows * k * n) as f64;
    let count = (ceilings.matmul / flops).ceil() as usize;
    let seconds = median(device, 1, || (0..count).try_for_each(|_| device.matmul(&x, &w).map(drop)))?;
    let rate = count as f64 * flops / seconds;
    Ok(Figure::new("ceiling: the same for a second", rate / 1e12, "TFLOP/s")
        .share("the matrix product", rate / ceilings.matmul))
}

/// Bytes a second of copies inside a GPU's memory, and to the GPU and from it.
fn copies<B: Backend>(device: &B, rows: usize) -> Result<(f64, [f64; 2])> {
    // Far larger than any cache, and than what asking for it costs.
    let wide = device.tensor(vec![1.0; rows * 16384], (rows, 16384))?;
    let bytes = (rows * 16384 * device.element_size()) as f64;
    // In a row, so that waiting for the end of one does not count as copying.
    let copies = || (0..COPIES).try_for_each(|_| device.copy(&wide).map(drop));
    let copy = 2.0 * bytes * COPIES as f64 / median(device, TIMES, copies)?;
    let offloaded = device.offload(&wide)?;
    // The next operation waits for the copy.
    let up = median(device, TIMES, || device.copy(&device.fetch(&offloaded)?))?;
    let down = median(device, TIMES, || device.copy(&device.fetch(&device.offload(&wide)?)?))? - up;
    Ok((copy, [bytes / up, bytes / down.max(f64::MIN_POSITIVE)]))
}

/// Bytes a second that all threads together read of memory that has been written before.
fn read() -> f64 {
    let memory = ReadMemory::new(READ);
    let pass = || {
        let start = Instant::now();
        (0..PASSES).for_each(|_| memory.read());
        (READ * PASSES) as f64 / start.elapsed().as_secs_f64()
    };
    middle((0..TIMES).map(|_| pass()).collect())
}

/// Single operations at the model's own shapes: where the phases' time comes from.
pub fn operations<B: Backend>(
    device: &B,
    config: &ModelConfig,
    seq_len: usize,
    ceilings: &Ceilings,
) -> Result<Vec<Figure>> {
    let (heads, kv_heads, head_dim) =
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let tensor = |width: usize| device.tensor(values(seq_len * width), (seq_len, width));
    let qkv = [tensor(heads * head_dim)?, tensor(kv_heads * head_dim)?, tensor(kv_heads * head_dim)?];
    let shape =
        AttentionShape { window: config.sliding_window, ..AttentionShape::new(heads, kv_heads, head_dim) };
    let batch = Batch::fresh([seq_len]);
    let attention = median(device, TIMES, || device.attention(&qkv, &batch, &shape, None))?;
    let mut figures = vec![operation("attention", attention, attention_flops(config, seq_len), ceilings)];
    drop(qkv);
    for width in [config.hidden_size, config.intermediate_size] {
        let x = tensor(width)?;
        let mut hessian = device.hessian(width)?;
        let seconds = median(device, TIMES, || device.accumulate(&mut hessian, &x))?;
        let flops = seq_len as f64 * (width as f64).powi(2);
        figures.push(operation(&format!("Hessian of {width} (half)"), seconds, flops, ceilings));
        let order: Vec<u32> = (0..width as u32).collect();
        let damp = seq_len as f32;
        let seconds = median(device, TIMES, || device.inverse_cholesky(&hessian, &order, damp).map(drop))?;
        let flops = 2.0 / 3.0 * (width as f64).powi(3);
        figures.push(operation(&format!("factor of {width}"), seconds, flops, ceilings));
    }
    Ok(figures)
}

fn operation(what: &str, seconds: f64, flops: f64, ceilings: &Ceilings) -> Figure {
    let figure = Figure::new(what, 1e3 * seconds, "ms").beside(flops / seconds / 1e12, "TFLOP/s");
    figure.share("the matrix product", flops / seconds / ceilings.matmul)
}

/// Causal attention of one sequence: two products over half of the score matrix.
pub fn attention_flops(config: &ModelConfig, seq_len: usize) -> f64 {
    let width = (config.num_attention_heads * config.head_dim) as f64;
    2.0 * (seq_len as f64).powi(2) * width
}

/// Values as activations have them: products of constants cost a GPU less power than real ones.
fn values(count: usize) -> Vec<f32> {
    let mix = |i: usize| {
        (i as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32).wrapping_mul(0x85EB_CA6B).rotate_left(13)
    };
    (0..count).map(|i| mix(i) as f32 / u32::MAX as f32 - 0.5).collect()
}

fn disk(out: &Path, kind: DeviceKind) -> Result<f64> {
    let bytes = match kind {
        DeviceKind::Gpu => 1 << 30,
        DeviceKind::Cpu => 64 << 20,
    };
    let path = out.join(".gptq-disk");
    let block = vec![0x5A_u8; 16 << 20];
    let start = Instant::now();
    let written = std::fs::File::create(&path).and_then(|mut file| {
        for _ in 0..bytes / block.len() {
            file.write_all(&block)?;
        }
        file.sync_all()
    });
    let seconds = start.elapsed().as_secs_f64();
    let _ = std::fs::remove_file(&path);
    written.with_context(|| path.display().to_string())?;
    Ok(bytes as f64 / seconds)
}
