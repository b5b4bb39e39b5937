//! What `config.json` says of a model, validated once: every later size follows from [`ModelConfig`].

mod experts;
mod families;
pub(crate) mod fields;
mod foreign;
mod parse;
mod presets;
mod rope;
mod window;
mod write;

use std::path::Path;

use gptq_kernels::{Activation, Dtype};
use serde_json::Value;

pub use experts::ExpertsConfig;
pub(crate) use families::ExpertNames;
use families::Family;
pub use families::{Architecture, QkNormKind};
pub use presets::PRESETS;
pub use rope::{LongRope, QueryGrowth, RopeScaling, Yarn};

use crate::{Error, Result};

/// A validated model configuration. Names are Hugging Face's.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// The base of windowed layers, where it is one of their own; nothing scales it.
    pub local_rope_theta: Option<f64>,
    /// Share of a head's features that is rotated, the first ones.
    pub partial_rotary_factor: f64,
    /// For every layer whether it has no rotation; empty where all have one.
    pub unrotated_layers: Vec<bool>,
    pub query_growth: Option<QueryGrowth>,
    pub tie_word_embeddings: bool,
    /// q, k and v carry a bias.
    pub qkv_bias: bool,
    /// o_proj carries a bias.
    pub o_bias: bool,
    /// gate, up and down carry a bias.
    pub mlp_bias: bool,
    /// q and k are normalised before the rotation.
    pub qk_norm: QkNormKind,
    /// In layers that have a window a token sees itself and at most `sliding_window - 1` tokens before it.
    pub sliding_window: Option<usize>,
    /// For every layer whether it has the window; empty where all have it (Mistral).
    pub windowed_layers: Vec<bool>,
    /// Of the MLPs' gates.
    pub activation: Activation,
    /// What scores of attention are multiplied by, where it is not `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f64>,
    /// Scores of attention become `cap tanh(score / cap)`.
    pub score_cap: Option<f64>,
    /// The same of the vocabulary's scores.
    pub logit_cap: Option<f64>,
    /// What embeddings are multiplied by, as the config says it.
    pub embedding_factor: f64,
    /// What attention and MLP add to the residual stream is multiplied by it.
    pub residual_factor: f64,
    /// What the vocabulary's scores are divided by.
    pub logit_divisor: f64,
    pub experts: Option<ExpertsConfig>,
    /// What the floating-point tensors of the checkpoint are stored in.
    pub dtype: Dtype,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads and validates a `config.json`.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(&fields::read_json(path)?, path)
    }

    /// Validates a parsed `config.json`, old style or new; `path` is for error messages.
    pub fn from_json(config: &Value, path: &Path) -> Result<Self> {
        let config = parse::parse(config, path)?;
        config.validate(path)?;
        Ok(config)
    }

    /// The architecture of a well-known model, one of [`PRESETS`].
    pub fn preset(name: &str) -> Result<Self> {
        let config = presets::preset(name)
            .ok_or_else(|| Error::UnknownPreset { name: name.into(), known: PRESETS.join(", ") })?;
        Self::from_json(&config, Path::new(name))
    }

    /// What the code of the family fixes.
    pub(crate) fn family(&self) -> &'static Family {
        self.architecture.family()
    }

    /// The window of layer `index`.
    pub fn window(&self, index: usize) -> Option<usize> {
        let windowed = self.windowed_layers.get(index).copied().unwrap_or(self.windowed_layers.is_empty());
        self.sliding_window.filter(|_| windowed)
    }

    /// Features of a head that are rotated.
    pub fn rotated(&self) -> usize {
        rope::rotated(self.head_dim, self.partial_rotary_factor)
    }

    /// Whether layer `index` is rotated by the base of windowed layers.
    pub fn is_local(&self, index: usize) -> bool {
        self.local_rope_theta.is_some() && self.windowed_layers.get(index).copied().unwrap_or(false)
    }

    /// Features that the norms of q and k have weights for.
    pub fn qk_norm_widths(&self) -> (usize, usize) {
        match self.qk_norm {
            QkNormKind::AllHeads => {
                (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim)
            }
            QkNormKind::Head | QkNormKind::None => (self.head_dim, self.head_dim),
        }
    }

    /// What embeddings are multiplied by. Gemma's root is rounded to the type of the weights where it is computed in.
    pub fn embedding_scale(&self, half_precision: bool) -> f32 {
        if !self.family().gemma {
            return self.embedding_factor as f32;
        }
        let root = (self.hidden_size as f64).sqrt() as f32;
        match self.dtype {
            Dtype::F16 if half_precision => half::f16::from_f32(root).to_f32(),
            Dtype::BF16 if half_precision => half::bf16::from_f32(root).to_f32(),
            _ => root,
        }
    }

    /// Tokens of a sequence at most, what stretches the rotation included.
    pub fn context_length(&self) -> usize {
        self.rope_scaling.context_length(self.max_position_embeddings)
    }

    /// A `config.json` that old and new transformers read.
    pub fn to_json(&self) -> Value {
        write::to_json(self)
    }

    /// Sizes that no model has are refused here, so that products of them cannot overflow later:
    /// a matrix has at most 2^44 elements, a model at most 4,096 layers.
    fn validate(&self, path: &Path) -> Result<()> {
        let refuse = |key: &str, expected: String, got: &dyn ToString| {
            Err(Error::Config { path: path.into(), key: key.into(), expected, got: got.to_string() })
        };
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, 4096),
            ("num_attention_heads", self.num_attention_heads, 1 << 16),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 16),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 28),
            ("sliding_window", self.sliding_window.unwrap_or(1), usize::MAX),
        ];
        for (key, size, largest) in sizes {
            if !(1..=largest).contains(&size) {
                return refuse(key, format!("1 to {largest}"), &size);
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return refuse("num_key_value_heads", format!("a divisor of {heads} attention heads"), &kv_heads);
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim", "an even number".into(), &self.head_dim);
        }
        if !(2..=self.head_dim).contains(&self.rotated()) || !self.rotated().is_multiple_of(2) {
            let expected = format!("an even share of {}", self.head_dim);
            return refuse("partial_rotary_factor", expected, &self.partial_rotary_factor);
        }
        if heads.checked_mul(self.head_dim).is_none_or(|width| width > 1 << 22) {
            return refuse("num_attention_heads", format!("at most {}", (1 << 22) / self.head_dim), &heads);
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return refuse("rms_norm_eps", "above 0, below 1".into(), &self.rms_norm_eps);
        }
        if !(self.rope_theta > 0.0 && self.rope_theta.is_finite()) {
            return refuse("rope_theta", "above 0".into(), &self.rope_theta);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(key: &str, value: Value) -> String {
        let mut config = ModelConfig::preset("tinyllama-1.1b").unwrap().to_json();
        config[key] = value;
        ModelConfig::from_json(&config, Path::new("config.json")).unwrap_err().to_string()
    }

    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        let cases = [
            ("hidden_size", json!(0), "config.json: hidden_size: expected 1 to 1048576, got 0"),
            (
                "vocab_size",
                json!(u64::MAX),
                "config.json: vocab_size: expected 1 to 16777216, got 18446744073709551615",
            ),
            (
                "num_hidden_layers",
                json!(4097),
                "config.json: num_hidden_layers: expected 1 to 4096, got 4097",
            ),
            ("num_hidden_layers", json!(-1), "num_hidden_layers: expected a whole number, 0 or more, got -1"),
            ("num_key_value_heads", json!(5), "expected a divisor of 32 attention heads, got 5"),
            ("num_key_value_heads", json!(0), "num_key_value_heads: expected 1 to 65536, got 0"),
            ("head_dim", json!(63), "config.json: head_dim: expected an even number, got 63"),
            ("num_attention_heads", json!(0), "num_attention_heads: expected 1 to 65536, got 0"),
            ("rms_norm_eps", json!(0), "config.json: rms_norm_eps: expected above 0, below 1, got 0"),
        ];
        for (key, value, expected) in cases {
            let message = refusal(key, value);
            assert!(message.contains(expected), "{message}");
            assert_eq!(message.lines().count(), 1);
        }
    }

    #[test]
    fn the_attention_width_is_capped_as_a_product() {
        let mut config = ModelConfig::preset("tinyllama-1.1b").unwrap();
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (1 << 16, 1, 1 << 14);
        let message = config.validate(Path::new("c")).unwrap_err().to_string();
        assert_eq!(message, "c: num_attention_heads: expected at most 256, got 65536");
    }

    #[test]
    fn an_unknown_preset_lists_the_known_ones() {
        let message = ModelConfig::preset("gpt2").unwrap_err().to_string();
        assert!(message.contains("gpt2") && message.contains("causallm-7b"), "{message}");
    }
}
