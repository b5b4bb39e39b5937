//! Rotary frequencies, with the scalings that supported models ask for.

use std::borrow::Cow;
use std::f64::consts::TAU;

use gptq_kernels::{Backend, Batch, RopeShape};

use crate::Result;
use crate::config::{ModelConfig, RopeScaling, Yarn};

/// The angle per position of each pair of features, `[head_dim / 2]`, for a sequence of `length` tokens:
/// `theta^(-2i / d)` for the `d` features that are rotated, scaled as the config says; 0 for pairs beyond them.
pub fn inverse_frequencies(config: &ModelConfig, length: usize) -> Vec<f32> {
    let d = config.rotated();
    let theta = match config.rope_scaling {
        RopeScaling::Dynamic { factor } => grown_base(config, factor, length),
        _ => config.rope_theta,
    };
    let plain = |i: usize| theta.powf(-2.0 * i as f64 / d as f64);
    let blend = match &config.rope_scaling {
        RopeScaling::Yarn(yarn) => blend(config, yarn),
        _ => vec![],
    };
    let scaled = |i: usize| match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => plain(i),
        RopeScaling::Linear { factor } => plain(i) / factor,
        RopeScaling::Llama3 { .. } => llama3(plain(i), &config.rope_scaling),
        RopeScaling::Yarn(yarn) => plain(i) * (blend[i] + (1.0 - blend[i]) / yarn.factor),
        RopeScaling::LongRope(long) if length > long.original_max_position_embeddings => {
            plain(i) / long.long_factor[i]
        }
        RopeScaling::LongRope(long) => plain(i) / long.short_factor[i],
    };
    padded(config, (0..d / 2).map(|i| scaled(i) as f32))
}

/// The same by a base that nothing scales.
pub fn local_frequencies(config: &ModelConfig, theta: f64) -> Vec<f32> {
    let d = config.rotated();
    padded(config, (0..d / 2).map(|i| theta.powf(-2.0 * i as f64 / d as f64) as f32))
}

fn padded(config: &ModelConfig, frequencies: impl Iterator<Item = f32>) -> Vec<f32> {
    frequencies.chain(std::iter::repeat(0.0)).take(config.head_dim / 2).collect()
}

/// Dynamic NTK: the base of a sequence that is longer than the model was trained for.
fn grown_base(config: &ModelConfig, factor: f64, length: usize) -> f64 {
    let (context, d) = (config.max_position_embeddings as f64, config.rotated() as f64);
    let stretch = (length as f64 / context).max(1.0);
    config.rope_theta * (factor * stretch - (factor - 1.0)).powf(d / (d - 2.0))
}

/// Llama 3.1 slows low frequencies by `factor`, keeps high ones, and blends those between.
fn llama3(frequency: f64, scaling: &RopeScaling) -> f64 {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        scaling
    else {
        return frequency;
    };
    let turns = *original_max_position_embeddings as f64 * frequency / TAU;
    let share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
    frequency * (share + (1.0 - share) / factor)
}

/// How much of each frequency YaRN keeps: all of those that turn `beta_fast` times in the original context, nothing of
/// those that turn `beta_slow` times or less.
fn blend(config: &ModelConfig, yarn: &Yarn) -> Vec<f64> {
    let d = config.rotated() as f64;
    let context = yarn.original_max_position_embeddings as f64;
    // The pair of features that turns so many times.
    let pair = |turns: f64| d * (context / (turns * TAU)).ln() / (2.0 * config.rope_theta.ln());
    let (low, high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
    let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, mut high) = (low.max(0.0), high.min(d - 1.0));
    if low == high {
        high += 0.001;
    }
    let slowed = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
    (0..config.rotated() / 2).map(|i| 1.0 - slowed(i)).collect()
}

/// How a layer turns q and k.
pub struct Rotation<B: Backend> {
    shape: RopeShape<B::Tensor>,
    by_length: Option<ByLength>,
}

/// Frequencies that depend on how long a sequence is.
struct ByLength {
    config: ModelConfig,
    /// The longest sequence that has those of a short one.
    longest_unscaled: usize,
}

impl<B: Backend> Rotation<B> {
    /// `shape` has the frequencies of a short sequence; `scaled` says whether the config's scaling is for this layer.
    pub fn new(config: &ModelConfig, shape: RopeShape<B::Tensor>, scaled: bool) -> Self {
        let longest = config.rope_scaling.longest_unscaled(config.max_position_embeddings);
        let longest = longest.filter(|_| scaled);
        let by_length = |longest_unscaled| ByLength { config: config.clone(), longest_unscaled };
        Self { shape, by_length: longest.map(by_length) }
    }

    /// Whether a sequence of the batch is so long that it has frequencies of its own.
    ///
    /// As in transformers they are those of its length at the time of the pass: keys that are in a cache keep what they
    /// were turned by.
    pub fn varies(&self, batch: &Batch) -> bool {
        let longest = self.by_length.as_ref().map(|by_length| by_length.longest_unscaled);
        longest.is_some_and(|longest| batch.sequences.iter().any(|s| s.context + s.rows > longest))
    }

    /// The shape for a batch.
    pub fn shape(&self, backend: &B, batch: &Batch) -> Result<Cow<'_, RopeShape<B::Tensor>>> {
        let Some(by_length) = self.by_length.as_ref().filter(|_| self.varies(batch)) else {
            return Ok(Cow::Borrowed(&self.shape));
        };
        let lengths = batch.sequences.iter().map(|sequence| sequence.context + sequence.rows);
        let frequencies: Vec<f32> =
            lengths.flat_map(|length| inverse_frequencies(&by_length.config, length)).collect();
        let rows = (batch.sequences.len(), self.shape.head_dim / 2);
        Ok(Cow::Owned(RopeShape { inv_freq: backend.wide_tensor(frequencies, rows)?, ..self.shape.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_frequencies_and_slows_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        assert_eq!(llama3(1.0, &scaling), 1.0);
        assert_eq!(llama3(1e-4, &scaling), 1e-4 / 8.0);
        let middle = 2.5 * TAU / 64.0;
        assert!((llama3(middle, &scaling) - middle * (0.5 + 0.5 / 8.0)).abs() < 1e-12);
    }

    #[test]
    fn a_dynamic_base_grows_only_beyond_the_trained_length() {
        let scaling = RopeScaling::Dynamic { factor: 2.0 };
        let plain = ModelConfig::preset("llama2-7b").unwrap();
        let config = ModelConfig { rope_scaling: scaling, ..plain.clone() };
        assert_eq!(inverse_frequencies(&config, 4096), inverse_frequencies(&plain, 4096));
        let (short, long) = (inverse_frequencies(&config, 4096), inverse_frequencies(&config, 8192));
        assert_eq!(short[0], long[0]);
        // Twice the length: the base grows by 3^(128 / 126), and the slowest pair has it to the power of 126 / 128.
        assert!((short[63] / long[63] - 3.0).abs() < 1e-4, "{}", short[63] / long[63]);
    }
}
