//! Architectures of well-known models, as their published `config.json` gives them.

use serde_json::{Value, json};

/// Names that [`super::ModelConfig::preset`] knows.
pub const PRESETS: &[&str] = &[
    "causallm-7b",
    "causallm-14b",
    "llama2-7b",
    "tinyllama-1.1b",
    "phi-4-mini",
    "gemma-3-4b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "glm-4-9b",
    "olmo-2-7b",
    "smollm3-3b",
];

pub(super) fn preset(name: &str) -> Option<Value> {
    Some(match name {
        "causallm-7b" => changed(llama2_7b(), causallm()),
        "causallm-14b" => changed(changed(llama2_7b(), causallm()), causallm_14b()),
        "llama2-7b" => llama2_7b(),
        "tinyllama-1.1b" => changed(llama2_7b(), tinyllama()),
        "phi-4-mini" => phi_4_mini(),
        "gemma-3-4b" => gemma_3_4b(),
        "qwen3-8b" => qwen3_8b(),
        "qwen3-30b-a3b" => changed(qwen3_8b(), qwen3_30b_a3b()),
        "mixtral-8x7b" => mixtral_8x7b(),
        "glm-4-9b" => glm_4_9b(),
        "olmo-2-7b" => olmo_2_7b(),
        "smollm3-3b" => smollm3_3b(),
        _ => return None,
    })
}

/// `config` with the keys of `changes`.
fn changed(mut config: Value, changes: Value) -> Value {
    if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
        config.extend(changes);
    }
    config
}

fn llama2_7b() -> Value {
    json!({
        "model_type": "llama", "torch_dtype": "float16", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    })
}

fn causallm() -> Value {
    json!({
        "vocab_size": 151_936, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "bos_token_id": 151_643, "eos_token_id": 151_643,
    })
}

fn causallm_14b() -> Value {
    json!({
        "hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 152_064,
    })
}

fn tinyllama() -> Value {
    json!({
        "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "max_position_embeddings": 2048,
    })
}

fn phi_4_mini() -> Value {
    let long_factor = [
        1.0,
        1.118320672,
        1.250641126,
        1.398617824,
        1.564103225,
        1.74916897,
        1.956131817,
        2.187582649,
        2.446418898,
        2.735880826,
        3.059592084,
        3.421605075,
        3.826451687,
        4.279200023,
        4.785517845,
        5.351743533,
        5.984965424,
        6.693110555,
        7.485043894,
        8.370679318,
        9.36110372,
        10.4687158,
        11.70738129,
        13.09260651,
        14.64173252,
        16.37415215,
        18.31155283,
        20.47818807,
        22.90118105,
        25.61086418,
        28.64115884,
        32.03,
        32.1,
        32.13,
        32.23,
        32.6,
        32.61,
        32.64,
        32.66,
        32.7,
        32.71,
        32.93,
        32.97,
        33.28,
        33.49,
        33.5,
        44.16,
        47.77,
    ];
    json!({
        "model_type": "phi3", "torch_dtype": "bfloat16", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200_064,
        "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.75, "sliding_window": 262_144, "tie_word_embeddings": true,
        "rope_scaling": { "type": "longrope", "short_factor": vec![1.0; 48], "long_factor": long_factor.to_vec() },
        "bos_token_id": 199_999, "eos_token_id": 199_999,
    })
}

fn gemma_3_4b() -> Value {
    json!({
        "model_type": "gemma3_text", "torch_dtype": "bfloat16", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 262_208, "sliding_window": 1024, "query_pre_attn_scalar": 256,
        "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
    })
}

fn qwen3_8b() -> Value {
    json!({
        "model_type": "qwen3", "torch_dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_theta": 1e6,
        "bos_token_id": 151_643, "eos_token_id": 151_645,
    })
}

fn qwen3_30b_a3b() -> Value {
    json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": true,
    })
}

fn mixtral_8x7b() -> Value {
    json!({
        "model_type": "mixtral", "torch_dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32_768, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    })
}

fn glm_4_9b() -> Value {
    json!({
        "model_type": "glm4", "torch_dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 13696,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": 151_552, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "attention_bias": true,
        "eos_token_id": [151_329, 151_336, 151_338],
    })
}

fn olmo_2_7b() -> Value {
    json!({
        "model_type": "olmo2", "torch_dtype": "float32", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 100_352,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "eos_token_id": 100_257,
    })
}

fn smollm3_3b() -> Value {
    json!({
        "model_type": "smollm3", "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128_256,
        "max_position_embeddings": 65_536, "rope_theta": 5e6, "eos_token_id": 128_012,
    })
}

#[cfg(test)]
mod tests {
    use crate::config::ModelConfig;
    use crate::layout::checkpoint_tensors;

    fn parameters(name: &str) -> usize {
        let config = ModelConfig::preset(name).unwrap();
        checkpoint_tensors(&config).iter().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    #[test]
    fn presets_have_their_published_parameter_counts() {
        assert_eq!(parameters("llama2-7b"), 6_738_415_616);
        assert_eq!(parameters("tinyllama-1.1b"), 1_100_048_384);
        // Llama 2 7B with 119,936 more tokens, each in the embedding and in the head.
        assert_eq!(parameters("causallm-7b"), 6_738_415_616 + 2 * 119_936 * 4096);
        // As their model cards count them, the embedding once where it is the head too.
        assert_eq!(parameters("phi-4-mini"), 3_836_021_760);
        assert_eq!(parameters("qwen3-8b"), 8_190_735_360);
        assert_eq!(parameters("qwen3-30b-a3b"), 30_532_122_624);
        assert_eq!(parameters("mixtral-8x7b"), 46_702_792_704);
        assert_eq!(parameters("olmo-2-7b"), 7_298_617_344);
        assert_eq!(parameters("smollm3-3b"), 3_075_098_624);
    }
}
