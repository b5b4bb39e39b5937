//! [`ModelConfig`] as a `config.json` for readers of every age.

use gptq_kernels::Dtype;
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling};

/// Old transformers read `torch_dtype`, `rope_theta` and `rope_scaling`, new ones `dtype` and
/// `rope_parameters`; both are written.
pub(super) fn to_json(config: &ModelConfig) -> Value {
    let eos = match config.eos_token_ids[..] {
        [] => Value::Null,
        [id] => json!(id),
        _ => json!(config.eos_token_ids),
    };
    let dtype = match config.dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        Dtype::F32 => "float32",
    };
    let mut json = json!({
        "architectures": [config.architecture.class_name()],
        "model_type": config.architecture.model_type(),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling(config),
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    });
    match config.architecture {
        Architecture::Llama => {
            json["attention_bias"] = json!(config.o_bias);
            json["mlp_bias"] = json!(config.mlp_bias);
        }
        Architecture::Mistral => json["sliding_window"] = json!(config.sliding_window),
        Architecture::Qwen2 => qwen_windows(config, &mut json),
        Architecture::Qwen3 => {
            json["attention_bias"] = json!(config.o_bias);
            qwen_windows(config, &mut json);
        }
    }
    json
}

/// Old readers know a first layer with a window, new ones a list.
fn qwen_windows(config: &ModelConfig, json: &mut Value) {
    json["use_sliding_window"] = json!(config.sliding_window.is_some());
    let windowed: Vec<bool> =
        (0..config.num_hidden_layers).map(|layer| config.window(layer).is_some()).collect();
    if let Some(window) = config.sliding_window {
        let name = |windowed: &bool| if *windowed { "sliding_attention" } else { "full_attention" };
        let first = windowed.iter().position(|windowed| *windowed).unwrap_or(config.num_hidden_layers);
        json["sliding_window"] = json!(window);
        json["max_window_layers"] = json!(first);
        json["layer_types"] = windowed.iter().map(name).collect();
    }
}

/// The first transformers versions with linear scaling insist on exactly `type` and `factor`.
fn rope_scaling(config: &ModelConfig) -> Value {
    match config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "type": "linear", "factor": factor }),
        RopeScaling::Dynamic { factor } => json!({ "type": "dynamic", "factor": factor }),
        RopeScaling::Llama3 { .. } | RopeScaling::Yarn(_) | RopeScaling::LongRope(_) => {
            let mut scaling = rope_parameters(config);
            if let Some(scaling) = scaling.as_object_mut() {
                scaling.shift_remove("rope_theta");
            }
            scaling
        }
    }
}

fn rope_parameters(config: &ModelConfig) -> Value {
    let mut json = match &config.rope_scaling {
        RopeScaling::None => json!({ "rope_type": "default" }),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Dynamic { factor } => json!({ "rope_type": "dynamic", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn(yarn) => json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "attention_factor": yarn.attention_factor,
            "truncate": yarn.truncate,
        }),
        RopeScaling::LongRope(long) => json!({
            "rope_type": "longrope",
            "factor": long.factor,
            "original_max_position_embeddings": long.original_max_position_embeddings,
            "short_factor": long.short_factor,
            "long_factor": long.long_factor,
            "attention_factor": long.attention_factor,
        }),
    };
    json["rope_theta"] = json!(config.rope_theta);
    json
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{LongRope, PRESETS, Yarn};

    fn round_trips(config: &ModelConfig) {
        let mut json = to_json(config);
        let read = |json: &Value| ModelConfig::from_json(json, Path::new("c")).unwrap();
        assert_eq!(&read(&json), config);
        for key in ["rope_parameters", "dtype"] {
            json.as_object_mut().unwrap().shift_remove(key);
        }
        assert_eq!(&read(&json), config, "as an old reader sees it");
        let mut json = to_json(config);
        for key in ["rope_scaling", "rope_theta", "torch_dtype"] {
            json.as_object_mut().unwrap().shift_remove(key);
        }
        assert_eq!(&read(&json), config, "as a new reader sees it");
    }

    #[test]
    fn every_preset_reads_back_equal() {
        PRESETS.iter().for_each(|name| round_trips(&ModelConfig::preset(name).unwrap()));
    }

    #[test]
    fn what_families_add_reads_back_equal() {
        let llama = ModelConfig::preset("llama2-7b").unwrap();
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        round_trips(&ModelConfig { rope_scaling: scaling, eos_token_ids: vec![2, 3], ..llama.clone() });
        let linear = RopeScaling::Linear { factor: 4.0 };
        round_trips(&ModelConfig {
            rope_scaling: linear,
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
            ..llama.clone()
        });
        let half = llama.head_dim / 2;
        let long = LongRope {
            short_factor: vec![1.0; half],
            long_factor: (0..half).map(|i| 1.0 + i as f64).collect(),
            factor: 4.0,
            original_max_position_embeddings: 1024,
            attention_factor: 1.25,
        };
        let yarn = Yarn {
            factor: 4.0,
            original_max_position_embeddings: 1024,
            beta_fast: 16.0,
            beta_slow: 2.0,
            attention_factor: 1.125,
            truncate: false,
        };
        let dynamic = RopeScaling::Dynamic { factor: 2.0 };
        for rope_scaling in [dynamic, RopeScaling::Yarn(yarn), RopeScaling::LongRope(long)] {
            round_trips(&ModelConfig { rope_scaling, ..llama.clone() });
        }
        round_trips(&ModelConfig {
            architecture: Architecture::Qwen2,
            qkv_bias: true,
            bos_token_id: None,
            sliding_window: Some(64),
            windowed_layers: (0..32).map(|layer| layer >= 20).collect(),
            ..llama.clone()
        });
        let mistral = ModelConfig { architecture: Architecture::Mistral, ..llama.clone() };
        round_trips(&ModelConfig { sliding_window: Some(4096), ..mistral.clone() });
        round_trips(&mistral);
        let none = ModelConfig { bos_token_id: None, eos_token_ids: vec![], ..llama };
        round_trips(&ModelConfig { architecture: Architecture::Qwen2, qkv_bias: true, ..none.clone() });
        round_trips(&ModelConfig {
            architecture: Architecture::Qwen3,
            qk_norm: true,
            dtype: Dtype::F32,
            ..none
        });
    }
}
