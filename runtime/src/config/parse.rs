//! From the keys of a `config.json` to [`ModelConfig`], with transformers' defaults.

use std::path::Path;

use gptq_kernels::{Activation, Dtype};
use serde_json::Value;

use super::experts::experts;
use super::families::{FAMILIES, Family, Flag};
use super::fields::Fields;
use super::rope::rope;
use super::window::{unrotated, windows};
use super::{Architecture, ModelConfig, QkNormKind, foreign};
use crate::{Error, Result};

/// Reads what the forward pass depends on and refuses by name what it does not implement.
pub(super) fn parse(config: &Value, path: &Path) -> Result<ModelConfig> {
    let config = Fields::new(config, path, "")?;
    let architecture = architecture(config)?;
    let family = architecture.family();
    let defaults = &family.defaults;
    let integer = |key| config.required(key, config.integer(key)?);
    let (hidden_size, heads, layers) =
        (integer("hidden_size")?, integer("num_attention_heads")?, integer("num_hidden_layers")?);
    let activation = activation(config, family)?;
    foreign::refuse(config, family)?;
    let max_position_embeddings = config.integer("max_position_embeddings")?.unwrap_or(defaults.context);
    let head_dim = head_dim(config, family, hidden_size, heads)?;
    let ropes = rope(config, family, max_position_embeddings, head_dim)?;
    let unrotated_layers = unrotated(config, family, layers)?;
    let (sliding_window, windowed_layers) = windows(config, family, layers, &unrotated_layers)?;
    let factor = |key: &'static str| match family.keys.contains(&key) {
        true => positive(config, key),
        false => Ok(None),
    };
    Ok(ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: integer("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: config.integer("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        vocab_size: integer("vocab_size")?,
        max_position_embeddings,
        rms_norm_eps: config.float("rms_norm_eps")?.unwrap_or(defaults.eps),
        rope_theta: ropes.theta,
        rope_scaling: ropes.scaling,
        local_rope_theta: ropes.local_theta,
        partial_rotary_factor: ropes.rotary_factor,
        unrotated_layers,
        query_growth: ropes.query_growth,
        tie_word_embeddings: config.boolean("tie_word_embeddings")?.unwrap_or(defaults.tied),
        qkv_bias: flag(config, family.qkv_bias)?,
        o_bias: flag(config, family.o_bias)?,
        mlp_bias: flag(config, family.mlp_bias)?,
        qk_norm: match family.qk_norm_key {
            Some(key) if !config.boolean(key)?.unwrap_or(false) => QkNormKind::None,
            _ => family.qk_norm,
        },
        sliding_window,
        windowed_layers,
        activation,
        attention_scale: match family.gemma {
            true => Some(1.0 / factor("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt()),
            // Granite's default is 1, not the root.
            false if family.keys.contains(&"attention_multiplier") => {
                Some(factor("attention_multiplier")?.unwrap_or(1.0))
            }
            false => None,
        },
        score_cap: cap(config, family, "attn_logit_softcapping", defaults.score_cap)?,
        logit_cap: cap(config, family, "final_logit_softcapping", defaults.logit_cap)?,
        embedding_factor: factor("embedding_multiplier")?.unwrap_or(1.0),
        residual_factor: factor("residual_multiplier")?.unwrap_or(1.0),
        logit_divisor: factor("logits_scaling")?.unwrap_or(1.0),
        experts: experts(config, family, layers)?,
        dtype: dtype(config)?,
        bos_token_id: token_ids(config, "bos_token_id", defaults.bos)?.first().copied(),
        eos_token_ids: token_ids(config, "eos_token_id", defaults.eos)?,
    })
}

fn flag(config: Fields, flag: Flag) -> Result<bool> {
    match flag {
        Flag::Never => Ok(false),
        Flag::Always => Ok(true),
        Flag::Key(key, default) => Ok(config.boolean(key)?.unwrap_or(default)),
    }
}

fn positive(config: Fields, key: &str) -> Result<Option<f64>> {
    match config.float(key)? {
        Some(value) if !(value > 0.0 && value.is_finite()) => Err(config.invalid(key, "a number above 0")),
        value => Ok(value),
    }
}

/// A soft cap; an explicit null is none.
fn cap(config: Fields, family: &Family, key: &str, default: Option<f64>) -> Result<Option<f64>> {
    match family.keys.contains(&key) && config.has(key) {
        true => positive(config, key),
        false => Ok(default),
    }
}

/// What is done with gates; without the key, the family's own.
fn activation(config: Fields, family: &Family) -> Result<Activation> {
    // Gemma has a key of its own, and ignores the other one.
    let key = if family.gemma { "hidden_activation" } else { "hidden_act" };
    match config.string(key)? {
        None => Ok(family.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some(_) => Err(config.invalid(key, "silu, gelu or gelu_pytorch_tanh")),
    }
}

/// `model_type` decides, as in transformers. `architectures` holds the name of a class, which old and converted files
/// spell in several ways; it is asked only where there is nothing else.
fn architecture(config: Fields) -> Result<Architecture> {
    let model_type = config.string("model_type")?;
    let name = match (model_type, config.value("architectures")) {
        (Some(name), _) => name,
        (None, Some(Value::Array(names))) if !names.is_empty() => {
            names[0].as_str().ok_or_else(|| config.invalid("architectures", "a list of strings"))?
        }
        (None, _) => return Err(config.invalid("model_type", "a value")),
    };
    let known = |family: &Family| if model_type.is_some() { family.model_type } else { family.class_name };
    let family = FAMILIES.iter().find(|family| known(family).eq_ignore_ascii_case(name));
    family.map(|family| family.architecture).ok_or_else(|| Error::UnsupportedArchitecture {
        path: config.path().into(),
        name: name.into(),
        supported: FAMILIES.each_ref().map(known).join(", "),
    })
}

fn head_dim(config: Fields, family: &Family, hidden_size: usize, heads: usize) -> Result<usize> {
    match config.integer("head_dim")?.or(family.defaults.head_dim) {
        Some(head_dim) => Ok(head_dim),
        // Zero heads are refused later, by their own name.
        None if hidden_size.is_multiple_of(heads) || heads == 0 => Ok(hidden_size / heads.max(1)),
        None => Err(config.invalid("hidden_size", format!("a multiple of {heads} attention heads"))),
    }
}

/// Files without the key are taken as fp16, what GPTQ readers compute in.
fn dtype(config: Fields) -> Result<Dtype> {
    let key = if config.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.string(key)?.map(|name| name.trim_start_matches("torch.")) {
        None | Some("float16") => Ok(Dtype::F16),
        Some("bfloat16") => Ok(Dtype::BF16),
        Some("float32") => Ok(Dtype::F32),
        Some(_) => Err(config.invalid(key, "float16, bfloat16 or float32")),
    }
}

/// One id, a list of ids, or an explicit null for none.
fn token_ids(config: Fields, key: &str, default: Option<u32>) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| id.try_into().ok());
        id.ok_or_else(|| config.invalid(key, "a token id, a list of token ids or null"))
    };
    match config.value(key) {
        None if config.has(key) => Ok(vec![]),
        None => Ok(default.into_iter().collect()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The least that a config must have, changed by `changes`.
    fn read(architecture: &str, changes: Value) -> Result<ModelConfig> {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(&config, Path::new("config.json"))
    }

    fn refusal(architecture: &str, changes: Value) -> String {
        read(architecture, changes).err().map_or("accepted".into(), |error| error.to_string())
    }

    #[test]
    fn missing_keys_mean_what_transformers_means() {
        let llama = read("LlamaForCausalLM", json!({})).unwrap();
        assert_eq!((llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings), (4, 16, 2048));
        assert_eq!((llama.rope_theta, llama.rms_norm_eps, llama.dtype), (10000.0, 1e-6, Dtype::F16));
        assert_eq!((llama.bos_token_id, &llama.eos_token_ids[..]), (Some(1), &[2][..]));
        assert!(!llama.qkv_bias && !llama.tie_word_embeddings && llama.sliding_window.is_none());
        assert_eq!(read("MistralForCausalLM", json!({})).unwrap().sliding_window, Some(4096));
        let unlimited = read("MistralForCausalLM", json!({"sliding_window": null})).unwrap();
        assert_eq!(unlimited.sliding_window, None);
        let qwen2 = read("Qwen2ForCausalLM", json!({"sliding_window": 16})).unwrap();
        assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.sliding_window.is_none());
        let qwen3 = read("Qwen3ForCausalLM", json!({})).unwrap();
        assert!(qwen3.qk_norm == QkNormKind::Head && !qwen3.qkv_bias && qwen3.head_dim == 128);
        let biased = read("LlamaForCausalLM", json!({"attention_bias": true})).unwrap();
        assert!(biased.qkv_bias && biased.o_bias && !biased.mlp_bias);
    }

    #[test]
    fn token_ids_are_one_or_many_or_none() {
        let eos = |value| read("LlamaForCausalLM", json!({"eos_token_id": value})).unwrap().eos_token_ids;
        assert_eq!(eos(json!(7)), [7]);
        assert_eq!(eos(json!([7, 8])), [7, 8]);
        assert_eq!(eos(json!(null)), [0; 0]);
        assert!(
            refusal("LlamaForCausalLM", json!({"eos_token_id": -1}))
                .contains("eos_token_id: expected a token id")
        );
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            (json!({"architectures": ["GPT2LMHeadModel"]}), "architecture GPT2LMHeadModel is not supported"),
            (
                json!({"architectures": [], "model_type": "gpt2"}),
                "expected one of llama, mistral, qwen2, qwen3, phi3",
            ),
            (
                json!({"hidden_act": "relu"}),
                r#"hidden_act: expected silu, gelu or gelu_pytorch_tanh, got "relu""#,
            ),
            (json!({"torch_dtype": "int8"}), "torch_dtype: expected float16, bfloat16 or float32"),
            (
                json!({"num_attention_heads": 7}),
                "hidden_size: expected a multiple of 7 attention heads, got 64",
            ),
            (json!({"vocab_size": null}), "config.json: vocab_size: expected a value, got null"),
            (json!({"hidden_size": "64"}), "hidden_size: expected a whole number, 0 or more, got \"64\""),
        ];
        for (changes, expected) in cases {
            let message = refusal("LlamaForCausalLM", changes);
            assert!(
                message.contains(expected) && message.lines().count() == 1,
                "expected {expected}, got {message}"
            );
        }
    }

    #[test]
    fn the_type_decides_whatever_the_class_is_called() {
        for class in ["LLaMAForCausalLM", "LlamaModel", "MistralForCausalLM"] {
            let llama = read(class, json!({"model_type": "llama"})).unwrap();
            assert_eq!(llama.architecture, Architecture::Llama, "{class}");
        }
        assert_eq!(read("LLaMAForCausalLM", json!({})).unwrap().architecture, Architecture::Llama);
        assert!(refusal("LlamaForCausalLM", json!({"model_type": "gpt2"})).contains("architecture gpt2"));
        for (name, activation) in
            [("swish", Activation::Silu), ("gelu", Activation::Gelu), ("gelu_new", Activation::GeluTanh)]
        {
            let config = read("LlamaForCausalLM", json!({"hidden_act": name})).unwrap();
            assert_eq!(config.activation, activation, "{name}");
        }
    }

    #[test]
    fn keys_of_other_families_are_refused_where_they_would_change_a_number() {
        let cases = [
            (json!({"num_experts": 8}), "num_experts: expected one MLP a layer, got 8"),
            (json!({"logits_scaling": 8.0}), "logits_scaling: expected scores as they are, got 8.0"),
            (json!({"quantization": {"bits": 4}}), "not of MLX"),
        ];
        for (changes, expected) in cases {
            assert!(refusal("LlamaForCausalLM", changes).contains(expected));
        }
        for harmless in [json!({"num_experts": 0}), json!({"logit_scale": 1}), json!({"no_rope_layers": []})]
        {
            assert_eq!(refusal("LlamaForCausalLM", harmless), "accepted");
        }
    }

    #[test]
    fn experts_that_cannot_be_are_refused_by_name() {
        let mixtral = |changes: Value| {
            let mut all = json!({"num_local_experts": 8, "num_experts_per_tok": 2});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            refusal("MixtralForCausalLM", all)
        };
        let cases = [
            (json!({}), "accepted"),
            (json!({"num_local_experts": 0}), "num_local_experts: expected 1 to 4096, got 0"),
            (json!({"num_experts": 4}), "num_experts: expected 8, as another key says, got 4"),
            (json!({"num_experts_per_tok": 9}), "num_experts_per_tok: expected 1 to 8, got 9"),
            (json!({"n_group": 3}), "n_group: expected a divisor of 8 experts"),
            (
                json!({"num_local_experts": 4096, "num_hidden_layers": 32}),
                "num_hidden_layers: expected at most 16",
            ),
            (json!({"hidden_act": "relu"}), "hidden_act: expected silu"),
        ];
        for (changes, expected) in cases {
            let message = mixtral(changes.clone());
            assert!(message.contains(expected), "{changes}: {message}");
        }
    }

    #[test]
    fn qwens_windows_are_those_of_transformers() {
        let windows = |changes: Value| {
            let mut all = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            let config = read("Qwen2ForCausalLM", all).unwrap();
            [config.window(0), config.window(1)]
        };
        assert_eq!(windows(json!({})), [None, Some(16)]);
        assert_eq!(
            windows(json!({"layer_types": ["sliding_attention", "full_attention"]})),
            [Some(16), None]
        );
        for without in [
            json!({"use_sliding_window": false}),
            json!({"sliding_window": null}),
            json!({"max_window_layers": 2}),
            json!({"layer_types": ["full_attention", "full_attention"]}),
        ] {
            assert_eq!(windows(without), [None, None]);
        }
        let unknown =
            json!({"use_sliding_window": true, "layer_types": ["full_attention", "linear_attention"]});
        assert!(refusal("Qwen2ForCausalLM", unknown).contains("layer_types: expected full_attention or"));
    }

    #[test]
    #[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
    fn configs_of_all_families_in_the_golden_folder_are_read() {
        let shared = std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set");
        let shared = Path::new(&shared);
        let mut read = 0;
        for folder in ["golden/logits", "models"] {
            for entry in std::fs::read_dir(shared.join(folder)).unwrap() {
                let dir = entry.unwrap().path();
                if dir.join("make.py").exists() {
                    continue; // Its weights are made from a package.
                }
                let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
                let checkpoint = crate::checkpoint::Checkpoint::open(&dir).unwrap();
                checkpoint.verify_against(&crate::layout::checkpoint_tensors(&config)).unwrap();
                read += 1;
            }
        }
        assert!(read >= 9, "{read} folders");
    }
}
