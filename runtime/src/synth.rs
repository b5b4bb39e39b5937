//! Random checkpoints of a given architecture, for tests of scale: sizes, speed and memory do not depend on
//! what the weights say.
//!
//! Weights are nearly normal with standard deviation 0.02, norms multiply by 1. One input column in 512 of every
//! matrix is eight times as large, at a random place, like the outliers of trained models. Element `i` of
//! tensor `t` takes bytes `8 i .. 8 i + 8` of ChaCha8's stream `t`: a seed gives the same files with any
//! number of threads.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use gptq_kernels::Dtype;
use half::{bf16, f16};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::{Map, json};

use crate::checkpoint::{FilePlan, shards, write_atomically};
use crate::config::ModelConfig;
use crate::layout::{TensorSpec, checkpoint_tensors};
use crate::{Error, Result};

const STANDARD_DEVIATION: f64 = 0.02;
const OUTLIER_SCALE: f64 = 8.0;
/// Input columns of which one is an outlier.
const OUTLIER_PERIOD: usize = 512;
/// Random bytes that are summed for one value. The sum of eight is normal to the eye, up to 4.9 deviations.
const BYTES_A_VALUE: usize = 8;
const SUMS: usize = BYTES_A_VALUE * 255 + 1;
/// Bytes that are generated, by all threads together, before they are written.
const BUFFER_BYTES: usize = 32 << 20;

/// Writes `config.json` and a random checkpoint, sharded above `max_shard_size` bytes, as the folder `dir`,
/// which must be new or empty and appears when it is complete. `progress` is told the bytes done and their total.
pub fn write_checkpoint(
    config: &ModelConfig,
    dir: &Path,
    seed: u64,
    max_shard_size: u64,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    refuse_content(dir)?;
    let Some(name) = dir.file_name() else {
        return Err(Error::NotEmpty { path: dir.into(), found: "no name".into() });
    };
    let work = dir.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    if work.exists() {
        fs::remove_dir_all(&work).map_err(Error::io(&work))?;
    }
    fs::create_dir_all(&work).map_err(Error::io(&work))?;
    write_files(config, &work, seed, max_shard_size, progress)?;
    if dir.exists() {
        fs::remove_dir(dir).map_err(Error::io(dir))?;
    }
    fs::rename(&work, dir).map_err(Error::io(dir))
}

fn write_files(
    config: &ModelConfig,
    dir: &Path,
    seed: u64,
    max_shard_size: u64,
    progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let specs = checkpoint_tensors(config);
    let total = specs.iter().map(TensorSpec::bytes).sum();
    let shards = shards(specs.clone(), max_shard_size);
    let streams: HashMap<&str, usize> =
        specs.iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
    let norm = if config.family().gemma { 0.0 } else { 1.0 };
    let mut done = 0;
    for (name, specs) in &shards {
        let plan = FilePlan::new(specs.clone(), &[("format", "pt".into())]);
        write_atomically(&dir.join(name), |file| {
            file.write_all(&plan.header)?;
            for (spec, _) in &plan.tensors {
                // Streams are numbered in the order of the model, whatever shard a tensor falls into.
                let stream = streams.get(spec.name.as_str()).copied().unwrap_or_default();
                let mut advance = |bytes: usize| {
                    done += bytes as u64;
                    progress(done, total);
                };
                let source = Source { seed, stream: stream as u64, norm };
                write_tensor(file, spec, config.dtype, source, &mut advance)?;
            }
            Ok(())
        })?;
    }
    if shards.len() > 1 {
        let of_file = |(file, specs): &(String, Vec<TensorSpec>)| {
            specs.iter().map(|spec| (spec.name.clone(), json!(file))).collect::<Vec<_>>()
        };
        let map: Map<_, _> = shards.iter().flat_map(of_file).collect();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    write_json(&dir.join("config.json"), &config.to_json())
}

/// What is there already is neither replaced nor mixed with ours.
fn refuse_content(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    match fs::read_dir(dir).map_err(Error::io(dir))?.next() {
        None => Ok(()),
        Some(entry) => {
            let name = entry.map_err(Error::io(dir))?.file_name().to_string_lossy().into_owned();
            Err(Error::NotEmpty { path: dir.into(), found: name })
        }
    }
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    write_atomically(path, |file| {
        serde_json::to_writer_pretty(&mut *file, json)?;
        file.write_all(b"\n")
    })
}

/// Where a tensor's random bytes come from.
#[derive(Clone, Copy)]
struct Source {
    seed: u64,
    stream: u64,
    /// What norms hold, so that they multiply by 1.
    norm: f64,
}

fn write_tensor(
    file: &mut impl Write,
    spec: &TensorSpec,
    dtype: Dtype,
    source: Source,
    advance: &mut dyn FnMut(usize),
) -> io::Result<()> {
    match dtype {
        Dtype::F16 => write_values(file, spec, source, &|x| f16::from_f64(x).to_le_bytes(), advance),
        Dtype::BF16 => write_values(file, spec, source, &|x| bf16::from_f64(x).to_le_bytes(), advance),
        Dtype::F32 => write_values(file, spec, source, &|x| (x as f32).to_le_bytes(), advance),
    }
}

fn write_values<const N: usize>(
    file: &mut impl Write,
    spec: &TensorSpec,
    source: Source,
    encode: &dyn Fn(f64) -> [u8; N],
    advance: &mut dyn FnMut(usize),
) -> io::Result<()> {
    let columns = spec.shape.last().copied().unwrap_or(1);
    let rows = spec.elements() as usize / columns;
    if spec.name.ends_with("norm.weight") {
        advance(columns * N);
        return file.write_all(&encode(source.norm).repeat(columns));
    }
    let row_bytes = columns * N;
    let rows_at_once = (BUFFER_BYTES / row_bytes).clamp(1, rows);
    let values = Values::new(spec, source, encode);
    let mut buffer = vec![0; rows_at_once * row_bytes];
    for first in (0..rows).step_by(rows_at_once) {
        let part = &mut buffer[..rows_at_once.min(rows - first) * row_bytes];
        part.par_chunks_mut(row_bytes).enumerate().for_each_init(Vec::new, |bytes, (i, row)| {
            values.fill_row(first + i, bytes, row.as_chunks_mut().0);
        });
        file.write_all(part)?;
        advance(part.len());
    }
    Ok(())
}

/// Encoded values by the sum of their random bytes.
struct Values<const N: usize> {
    ordinary: Vec<[u8; N]>,
    outlier: Vec<[u8; N]>,
    /// The first outlier column; past the end where there are none.
    first_outlier: usize,
    rng: ChaCha8Rng,
}

impl<const N: usize> Values<N> {
    fn new(spec: &TensorSpec, source: Source, encode: &dyn Fn(f64) -> [u8; N]) -> Self {
        // The variance of a uniform byte is (256^2 - 1) / 12.
        let deviation = (BYTES_A_VALUE as f64 * 65535.0 / 12.0).sqrt();
        let table = |scale: f64| {
            let value = |sum: usize| (sum as f64 - (SUMS - 1) as f64 / 2.0) / deviation * scale;
            (0..SUMS).map(|sum| encode(value(sum))).collect()
        };
        let mut rng = ChaCha8Rng::seed_from_u64(source.seed);
        rng.set_stream(source.stream);
        // The place of the outliers comes from the far end of the stream, which no element reaches.
        rng.set_word_pos(u128::from(u64::MAX));
        let place = rng.next_u32() as usize % OUTLIER_PERIOD;
        Self {
            ordinary: table(STANDARD_DEVIATION),
            outlier: table(STANDARD_DEVIATION * OUTLIER_SCALE),
            first_outlier: if spec.shape.len() > 1 { place } else { usize::MAX },
            rng,
        }
    }

    /// Row `index` of the tensor; `bytes` is room to work in.
    fn fill_row(&self, index: usize, bytes: &mut Vec<u8>, row: &mut [[u8; N]]) {
        bytes.resize(row.len() * BYTES_A_VALUE, 0);
        let mut rng = self.rng.clone();
        // A word of the stream has four bytes.
        rng.set_word_pos((index * bytes.len() / 4) as u128);
        rng.fill_bytes(bytes);
        let bytes = bytes.as_chunks::<BYTES_A_VALUE>().0;
        let sum = |bytes: &[u8; BYTES_A_VALUE]| bytes.iter().map(|b| u16::from(*b)).sum::<u16>() as usize;
        for (value, bytes) in row.iter_mut().zip(bytes) {
            *value = self.ordinary[sum(bytes)];
        }
        for column in (self.first_outlier..row.len()).step_by(OUTLIER_PERIOD) {
            row[column] = self.outlier[sum(&bytes[column])];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn tiny() -> ModelConfig {
        ModelConfig {
            hidden_size: 640,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 300,
            qkv_bias: true,
            o_bias: true,
            ..ModelConfig::preset("llama2-7b").unwrap()
        }
    }

    fn written(
        config: &ModelConfig,
        seed: u64,
        max_shard: u64,
        threads: usize,
    ) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.scope(|_| write_checkpoint(config, dir.path(), seed, max_shard, &|_, _| {})).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (dir, checkpoint)
    }

    #[test]
    fn a_seed_gives_the_same_bytes_with_any_number_of_threads_and_shards() {
        let config = tiny();
        let (dir, one) = written(&config, 1, u64::MAX, 1);
        let (_sharded, three) = written(&config, 1, 200_000, 3);
        let (_other, other) = written(&config, 2, u64::MAX, 1);
        assert_eq!(one.file_sizes().len(), 1);
        assert!(three.file_sizes().len() > 2);
        one.verify_against(&checkpoint_tensors(&config)).unwrap();
        assert!(one.names().eq(three.names()));
        assert!(one.names().all(|name| one.raw(name) == three.raw(name)));
        let embedding = "model.embed_tokens.weight";
        assert_ne!(one.raw(embedding), other.raw(embedding));
        assert_ne!(one.raw(embedding).map(|b| &b[..999]), one.raw("lm_head.weight").map(|b| &b[..999]));
        assert_eq!(ModelConfig::from_file(&dir.path().join("config.json")).unwrap(), config);
    }

    #[test]
    fn weights_are_normal_with_a_few_outlier_columns() {
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let (_dir, checkpoint) = written(&ModelConfig { dtype, ..tiny() }, 3, u64::MAX, 2);
            let weights = checkpoint.tensor("lm_head.weight", &[300, 640]).unwrap().to_f32();
            let deviation = |column: usize| {
                let squares = weights.iter().skip(column).step_by(640).map(|x| f64::from(x * x));
                (squares.sum::<f64>() / 300.0).sqrt()
            };
            let (large, small): (Vec<f64>, Vec<f64>) = (0..640).map(deviation).partition(|d| *d > 0.06);
            assert!((1..=2).contains(&large.len()), "{} outlier columns", large.len());
            // Five standard errors of a column's deviation: 0.02 / sqrt(2 * 300) each.
            assert!(small.iter().all(|d| (d - 0.02).abs() < 0.0041), "{small:?}");
            let mean = small.iter().sum::<f64>() / small.len() as f64;
            assert!((mean - 0.02).abs() < 0.0002, "{mean}");
            let norm = checkpoint.tensor("model.norm.weight", &[640]).unwrap().to_f32();
            assert!(norm.iter().all(|x| *x == 1.0));
            let bias = checkpoint.tensor("model.layers.1.self_attn.k_proj.bias", &[32]).unwrap().to_f32();
            assert!(bias.iter().any(|x| *x != 0.0) && bias.iter().all(|x| x.abs() < 0.1));
        }
    }

    #[test]
    fn an_existing_model_is_not_overwritten() {
        let (dir, _checkpoint) = written(&tiny(), 1, u64::MAX, 1);
        let again = write_checkpoint(&tiny(), dir.path(), 1, u64::MAX, &|_, _| {});
        assert!(again.unwrap_err().to_string().contains("new or empty folder"));
    }

    #[test]
    fn progress_ends_at_the_total() {
        let dir = tempfile::tempdir().unwrap();
        let left = std::cell::Cell::new(1);
        write_checkpoint(&tiny(), dir.path(), 1, 100_000, &|done, total| left.set(total - done)).unwrap();
        assert_eq!(left.get(), 0);
    }
}
