//! [`ModelConfig`] as a `config.json` for readers of every age.

use gptq_kernels::{Activation, Dtype};
use serde_json::{Value, json};

use super::families::{Demand, Family, Flag, Windows};
use super::{Architecture, ExpertsConfig, ModelConfig, QkNormKind, RopeScaling};

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
    let family = config.architecture.family();
    let activation = match config.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Gelu => "gelu",
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
        "hidden_act": activation,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling(config),
        "rope_parameters": rope_parameters_by_type(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    });
    for flag in [family.qkv_bias, family.o_bias, family.mlp_bias] {
        if let Flag::Key(key, _) = flag {
            json[key] = json!(config.has_bias(flag, family));
        }
    }
    if config.architecture == Architecture::Gemma3 {
        json["rope_local_base_freq"] = json!(config.local_rope_theta);
    }
    windows(config, family.windows, &mut json);
    for key in family.keys {
        if let Some(value) = own_key(config, key) {
            json[*key] = value;
        }
    }
    if let Some(experts) = &config.experts {
        write_experts(config, experts, &mut json);
    }
    json
}

impl ModelConfig {
    /// What a key says that one or more of the family's biases follow from.
    fn has_bias(&self, flag: Flag, family: &Family) -> bool {
        match flag {
            flag if flag == family.qkv_bias => self.qkv_bias,
            flag if flag == family.o_bias => self.o_bias,
            _ => self.mlp_bias,
        }
    }
}

/// The value of a key that only some families have.
fn own_key(config: &ModelConfig, key: &str) -> Option<Value> {
    let scale = config.attention_scale.unwrap_or(1.0);
    Some(match key {
        "attn_logit_softcapping" => json!(config.score_cap),
        "final_logit_softcapping" => json!(config.logit_cap),
        "query_pre_attn_scalar" => json!((1.0 / (scale * scale)).round()),
        "attention_multiplier" => json!(scale),
        "embedding_multiplier" => json!(config.embedding_factor),
        "residual_multiplier" => json!(config.residual_factor),
        "logits_scaling" => json!(config.logit_divisor),
        "partial_rotary_factor" => json!(config.partial_rotary_factor),
        "use_qk_norm" => json!(config.qk_norm != QkNormKind::None),
        "no_rope_layers" => {
            let rotates = |layer| u8::from(!config.unrotated_layers.get(layer).copied().unwrap_or(false));
            (0..config.num_hidden_layers).map(rotates).collect()
        }
        _ => return None,
    })
}

fn write_experts(config: &ModelConfig, experts: &ExpertsConfig, json: &mut Value) {
    let count = match config.architecture {
        Architecture::Mixtral => "num_local_experts",
        Architecture::Glm4Moe => "n_routed_experts",
        _ => "num_experts",
    };
    let dense: Vec<usize> =
        (0..config.num_hidden_layers).filter(|layer| experts.layers.get(*layer) == Some(&false)).collect();
    json[count] = json!(experts.count);
    json["num_experts_per_tok"] = json!(experts.per_token);
    json["norm_topk_prob"] = json!(experts.renormalise);
    if experts.width != config.intermediate_size {
        json["moe_intermediate_size"] = json!(experts.width);
    }
    if config.architecture == Architecture::Glm4Moe {
        // The layers that transformers' class takes, which knows no list.
        json["first_k_dense_replace"] = json!(dense.len());
        json["n_shared_experts"] = json!(experts.shared_width / experts.width.max(1));
        json["n_group"] = json!(experts.groups);
        json["topk_group"] = json!(experts.groups_kept);
        json["routed_scaling_factor"] = json!(experts.factor);
        return;
    }
    json["mlp_only_layers"] = json!(dense);
    if experts.shared_width > 0 {
        json["shared_expert_intermediate_size"] = json!(experts.shared_width);
    }
}

/// Old readers of Qwen know a first layer with a window, new ones a list.
fn windows(config: &ModelConfig, windows: Windows, json: &mut Value) {
    let windowed = |layer| config.windowed_layers.get(layer).copied().unwrap_or(false);
    let types = || -> Value {
        let name = |layer| if windowed(layer) { "sliding_attention" } else { "full_attention" };
        (0..config.num_hidden_layers).map(name).collect()
    };
    match windows {
        Windows::Never => {}
        Windows::Everywhere(_) => json["sliding_window"] = json!(config.sliding_window),
        Windows::OnDemand(demand) => {
            json["use_sliding_window"] = json!(config.sliding_window.is_some());
            if let Some(window) = config.sliding_window {
                json["sliding_window"] = json!(window);
                if demand != Demand::All {
                    let first = (0..config.num_hidden_layers).position(windowed);
                    json["max_window_layers"] = json!(first.unwrap_or(config.num_hidden_layers));
                    json["layer_types"] = types();
                }
            }
        }
        Windows::AllButEvery(_) => {
            json["sliding_window"] = json!(config.sliding_window);
            json["layer_types"] = types();
        }
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

/// For each kind of layer where windowed ones have a base of their own.
fn rope_parameters_by_type(config: &ModelConfig) -> Value {
    match config.local_rope_theta {
        None => rope_parameters(config),
        Some(theta) => json!({
            "full_attention": rope_parameters(config),
            "sliding_attention": { "rope_type": "default", "rope_theta": theta },
        }),
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
    if config.partial_rotary_factor != 1.0 {
        json["partial_rotary_factor"] = json!(config.partial_rotary_factor);
    }
    if let Some(growth) = config.query_growth {
        json["llama_4_scaling_beta"] = json!(growth.beta);
        json["original_max_position_embeddings"] = json!(growth.original);
    }
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
            qk_norm: QkNormKind::Head,
            dtype: Dtype::F32,
            ..none
        });
    }
}
