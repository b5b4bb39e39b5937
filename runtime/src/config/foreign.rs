//! Keys of a config that change a model's numbers in a way that the forward pass does not know.
//!
//! Transformers ignores keys that a family's class does not read, and so do we, except for these: other families, and
//! files made for other programs, use them for operations that would silently be missing.

use serde_json::Value;

use super::families::{Family, QkNormKind};
use super::fields::Fields;
use crate::Result;

/// What a key may say without changing anything.
enum Neutral {
    /// Nothing but `null`, `false`, 0 or an empty list or object.
    Nothing,
    One,
}

/// The keys, and what each would ask for.
const FOREIGN: &[(&str, Neutral, &str)] = &[
    ("attn_logit_softcapping", Neutral::Nothing, "attention scores without a cap"),
    ("final_logit_softcapping", Neutral::Nothing, "scores without a cap"),
    ("query_pre_attn_scalar", Neutral::Nothing, "scores divided by the root of head_dim"),
    ("attention_multiplier", Neutral::Nothing, "scores divided by the root of head_dim"),
    ("embedding_multiplier", Neutral::One, "embeddings as they are"),
    ("residual_multiplier", Neutral::One, "residuals as they are"),
    ("logits_scaling", Neutral::One, "scores as they are"),
    ("logit_scale", Neutral::One, "scores as they are"),
    ("scale_emb", Neutral::One, "embeddings as they are"),
    ("scale_depth", Neutral::Nothing, "residuals as they are"),
    ("clip_qkv", Neutral::Nothing, "q, k and v as they are"),
    ("use_qk_norm", Neutral::Nothing, "q and k without norms of their own"),
    ("qk_layernorm", Neutral::Nothing, "q and k without norms of their own"),
    ("no_rope_layers", Neutral::Nothing, "rotation in every layer"),
    ("no_rope_layer_interval", Neutral::Nothing, "rotation in every layer"),
    ("attention_chunk_size", Neutral::Nothing, "attention over all tokens before"),
    ("alibi", Neutral::Nothing, "rotary positions"),
    ("use_alibi", Neutral::Nothing, "rotary positions"),
    ("rotary_pct", Neutral::One, "rotation of whole heads"),
    ("num_local_experts", Neutral::Nothing, "one MLP a layer"),
    ("num_experts", Neutral::Nothing, "one MLP a layer"),
    ("n_routed_experts", Neutral::Nothing, "one MLP a layer"),
    ("llama_4_scaling_beta", Neutral::Nothing, "queries that do not grow"),
    ("residual_scale", Neutral::One, "residuals as they are"),
    // Weights of other quantizers.
    ("quantization", Neutral::Nothing, "weights of GPTQ or none, not of MLX"),
    ("compression_config", Neutral::Nothing, "weights of GPTQ or none, not of compressed-tensors"),
];

/// Refuses a config with one of these keys, unless it says nothing, or the family knows it.
pub(super) fn refuse(config: Fields, family: &Family) -> Result<()> {
    let knows = |key: &str| {
        family.keys.contains(&key)
            || family.experts.is_some() && key.ends_with("_experts")
            || family.qk_norm != QkNormKind::None && key.starts_with("use_qk_norm")
    };
    for (key, neutral, expected) in FOREIGN.iter().filter(|(key, _, _)| !knows(key)) {
        let Some(value) = config.value(key) else { continue };
        let harmless = match neutral {
            Neutral::Nothing => is_nothing(value),
            Neutral::One => value.as_f64() == Some(1.0),
        };
        if !harmless {
            return Err(config.invalid(key, *expected));
        }
    }
    Ok(())
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => value.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
    }
}
