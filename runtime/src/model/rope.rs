//! Rotary frequencies, with the scalings that supported models ask for.

use std::f64::consts::TAU;

use crate::config::{ModelConfig, RopeScaling};

/// `theta^(-2i / head_dim)` for each pair of features, scaled as the config says.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let d = config.head_dim;
    let plain = |i: usize| config.rope_theta.powf(-2.0 * i as f64 / d as f64);
    (0..d / 2).map(|i| scaled(plain(i), &config.rope_scaling) as f32).collect()
}

/// Llama 3.1 slows low frequencies by `factor`, keeps high ones, and blends those between.
fn scaled(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let turns = original_max_position_embeddings as f64 * frequency / TAU;
            let share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * (share + (1.0 - share) / factor)
        }
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
        assert_eq!(scaled(1.0, &scaling), 1.0);
        assert_eq!(scaled(1e-4, &scaling), 1e-4 / 8.0);
        let middle = 2.5 * TAU / 64.0;
        assert!((scaled(middle, &scaling) - middle * (0.5 + 0.5 / 8.0)).abs() < 1e-12);
    }
}
