//! Architectures of well-known models, as their published `config.json` gives them.

use gptq_kernels::Dtype;

use super::{Architecture, ModelConfig, RopeScaling};

/// Names that [`ModelConfig::preset`] knows.
pub const PRESETS: &[&str] = &["causallm-7b", "causallm-14b", "llama2-7b", "tinyllama-1.1b"];

pub(super) fn preset(name: &str) -> Option<ModelConfig> {
    match name {
        "causallm-7b" => Some(causallm_7b()),
        "causallm-14b" => Some(causallm_14b()),
        "llama2-7b" => Some(llama2_7b()),
        "tinyllama-1.1b" => Some(tinyllama()),
        _ => None,
    }
}

fn llama2_7b() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 4096,
        intermediate_size: 11008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        vocab_size: 32000,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        windowed_layers: vec![],
        dtype: Dtype::F16,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

fn causallm_7b() -> ModelConfig {
    ModelConfig {
        vocab_size: 151_936,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-6,
        bos_token_id: Some(151_643),
        eos_token_ids: vec![151_643],
        ..llama2_7b()
    }
}

fn causallm_14b() -> ModelConfig {
    ModelConfig {
        hidden_size: 5120,
        intermediate_size: 13696,
        num_hidden_layers: 40,
        num_attention_heads: 40,
        num_key_value_heads: 40,
        vocab_size: 152_064,
        ..causallm_7b()
    }
}

fn tinyllama() -> ModelConfig {
    ModelConfig {
        hidden_size: 2048,
        intermediate_size: 5632,
        num_hidden_layers: 22,
        num_key_value_heads: 4,
        head_dim: 64,
        max_position_embeddings: 2048,
        dtype: Dtype::BF16,
        ..llama2_7b()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::checkpoint_tensors;

    fn parameters(name: &str) -> usize {
        let config = preset(name).unwrap();
        checkpoint_tensors(&config).iter().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    #[test]
    fn presets_have_their_published_parameter_counts() {
        assert_eq!(parameters("llama2-7b"), 6_738_415_616);
        assert_eq!(parameters("tinyllama-1.1b"), 1_100_048_384);
        // Llama 2 7B with 119,936 more tokens, each in the embedding and in the head.
        assert_eq!(parameters("causallm-7b"), 6_738_415_616 + 2 * 119_936 * 4096);
        assert!(super::super::PRESETS.iter().all(|name| preset(name).is_some()));
    }
}
