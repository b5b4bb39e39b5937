//! Names, types and shapes of all tensors of a checkpoint or an artifact.

use gptq_kernels::Dtype;

use super::{LinearSpec, layer, layer_prefix, linears};
use crate::config::ModelConfig;
use crate::quant_config::QuantConfig;
use crate::{Error, Result};

/// The element types that occur in checkpoints and artifacts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredDtype {
    F16,
    BF16,
    F32,
    I32,
}

/// One tensor of a file: its name, element type and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
}

/// Every tensor of a checkpoint that is not quantized.
pub fn checkpoint_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    tensors(config, &|prefix, linear| {
        let (module, dtype) = (&linear.module, config.dtype.into());
        let mut specs = vec![TensorSpec::new(
            format!("{prefix}{module}.weight"),
            dtype,
            [linear.out_features, linear.in_features],
        )];
        if linear.bias {
            specs.push(TensorSpec::new(format!("{prefix}{module}.bias"), dtype, [linear.out_features]));
        }
        specs
    })
}

/// Every tensor of a GPTQ artifact. What is not quantized keeps the checkpoint's element type.
/// `zero_bias` gives every linear a bias, as AutoGPTQ 0.4.2 does.
pub fn artifact_tensors(config: &ModelConfig, quant: &QuantConfig, zero_bias: bool) -> Vec<TensorSpec> {
    tensors(config, &|prefix, linear| quantized_linear(prefix, linear, quant, zero_bias || linear.bias))
}

/// Refuses combinations whose codes do not fill whole 32-bit words.
pub fn check_quantizable(config: &ModelConfig, quant: &QuantConfig) -> Result<()> {
    quant.validate()?;
    // The smallest number of codes whose bits fill whole words.
    let multiple = match quant.bits {
        3 => 32,
        bits => 32 / bits as usize,
    };
    for (_, linear) in linears(config) {
        let sizes = [("in_features", linear.in_features), ("out_features", linear.out_features)];
        for (dimension, size) in sizes {
            if !size.is_multiple_of(multiple) {
                let (linear, bits) = (linear.module.clone(), quant.bits);
                return Err(Error::Unquantizable { linear, dimension, bits, multiple, size });
            }
        }
    }
    Ok(())
}

impl StoredDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 | Self::I32 => 4,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F32 => "F32",
            Self::I32 => "I32",
        }
    }

    /// The element type of a safetensors header, if it is one of ours.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F16, Self::BF16, Self::F32, Self::I32].into_iter().find(|dtype| dtype.name() == name)
    }

    /// The floating-point type, `None` for integers.
    pub fn float(self) -> Option<Dtype> {
        match self {
            Self::F16 => Some(Dtype::F16),
            Self::BF16 => Some(Dtype::BF16),
            Self::F32 => Some(Dtype::F32),
            Self::I32 => None,
        }
    }
}

impl From<Dtype> for StoredDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::BF16,
            Dtype::F32 => Self::F32,
        }
    }
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, dtype: StoredDtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }

    /// Bytes of the tensor in a file.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }
}

/// Tensors of layer `index` that are no linear's.
pub fn layer_tensors(config: &ModelConfig, index: usize) -> Vec<TensorSpec> {
    let prefix = layer_prefix(index);
    let others = layer(config, index).others.into_iter();
    others
        .map(|(name, shape)| TensorSpec::new(format!("{prefix}{name}"), config.dtype.into(), shape))
        .collect()
}

/// Tensors outside the layers: embedding, final norm, head.
pub fn outer_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let (dtype, hidden, vocab) = (config.dtype.into(), config.hidden_size, config.vocab_size);
    let mut all = vec![
        TensorSpec::new("model.embed_tokens.weight", dtype, [vocab, hidden]),
        TensorSpec::new("model.norm.weight", dtype, [hidden]),
    ];
    if !config.tie_word_embeddings {
        all.push(TensorSpec::new("lm_head.weight", dtype, [vocab, hidden]));
    }
    all
}

/// Tensors that stay as they are when a model is quantized.
pub fn other_tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let layers = (0..config.num_hidden_layers).flat_map(|index| layer_tensors(config, index));
    outer_tensors(config).into_iter().chain(layers).collect()
}

/// All tensors of a model in the order of its modules; `linear` gives those of one linear from the layer's
/// prefix.
fn tensors(config: &ModelConfig, linear: &dyn Fn(&str, &LinearSpec) -> Vec<TensorSpec>) -> Vec<TensorSpec> {
    let mut outer = outer_tensors(config);
    let after = outer.split_off(1);
    let mut all = outer;
    let first = config.family().norms.before_attention.map(|name| format!("{name}.weight"));
    for index in 0..config.num_hidden_layers {
        let prefix = layer_prefix(index);
        let is_first = |spec: &TensorSpec| spec.name.strip_prefix(&prefix) == first.as_deref();
        let (before, others): (Vec<_>, Vec<_>) = layer_tensors(config, index).into_iter().partition(is_first);
        all.extend(before);
        all.extend(layer(config, index).linears().flat_map(|spec| linear(&prefix, spec)));
        all.extend(others);
    }
    all.extend(after);
    all
}

fn quantized_linear(prefix: &str, linear: &LinearSpec, quant: &QuantConfig, bias: bool) -> Vec<TensorSpec> {
    let (k, n) = (linear.in_features, linear.out_features);
    let groups = quant.groups(k);
    let words = |codes: usize| codes * quant.bits as usize / 32;
    let spec = |tensor, dtype, shape: &[usize]| {
        TensorSpec::new(format!("{prefix}{}.{tensor}", linear.module), dtype, shape)
    };
    let mut specs = vec![
        spec("qweight", StoredDtype::I32, &[words(k), n]),
        spec("qzeros", StoredDtype::I32, &[groups, words(n)]),
        spec("scales", StoredDtype::F16, &[groups, n]),
        spec("g_idx", StoredDtype::I32, &[k]),
    ];
    if bias {
        specs.push(spec("bias", StoredDtype::F16, &[n]));
    }
    specs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{self, Split};

    fn quant(bits: u32, group_size: Option<usize>) -> QuantConfig {
        QuantConfig { bits, group_size, ..QuantConfig::default() }
    }

    fn total(specs: &[TensorSpec]) -> u64 {
        specs.iter().map(TensorSpec::bytes).sum()
    }

    #[test]
    fn artifacts_have_the_published_sizes() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let published = [
            (4, Some(128), 5_861_613_568),
            (4, Some(32), 6_241_067_008),
            (8, None, 8_977_211_392),
            (8, Some(128), 9_124_913_152),
            (8, Some(32), 9_580_257_280),
            (4, Some(64), 5_988_098_048),
        ];
        for (bits, group_size, bytes) in published {
            assert_eq!(total(&artifact_tensors(&config, &quant(bits, group_size), true)), bytes);
        }
        let main = artifact_tensors(&config, &quant(4, Some(128)), true);
        assert_eq!(main.len(), 1187);
        assert_eq!(main.iter().map(TensorSpec::elements).sum::<u64>(), 2_113_843_200);
    }

    /// A device that has some heads, or some features between two products, must find whole parts in every linear, and
    /// nothing else to ask other devices for than a sum.
    #[test]
    fn groups_can_be_divided_in_pairs() {
        for preset in ["causallm-7b", "qwen3-8b", "olmo-2-7b", "qwen3-30b-a3b", "phi-4-mini"] {
            let config = ModelConfig::preset(preset).unwrap();
            for pair in layout::layer(&config, 0).groups.chunks(2) {
                let [first, second] = pair else { panic!("{preset}: a group without its second") };
                match (first.split, second.split) {
                    (Split::Whole, Split::Whole) => {
                        assert_eq!(preset, "olmo-2-7b", "its norm is of all heads")
                    }
                    (Split::Columns { parts }, Split::Rows { parts: same }) => {
                        assert_eq!(parts, same, "{preset}");
                        assert!(first.linears.iter().all(|linear| linear.out_features.is_multiple_of(parts)));
                        assert!(second.linears.iter().all(|linear| linear.in_features.is_multiple_of(parts)));
                    }
                    other => panic!("{preset}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_short_last_group_counts_as_a_group() {
        let mut config = ModelConfig::preset("tinyllama-1.1b").unwrap();
        config.intermediate_size = 5632 + 32;
        let specs = artifact_tensors(&config, &quant(3, Some(128)), false);
        let shape = |name: &str| &specs.iter().find(|s| s.name == name).unwrap().shape;
        assert_eq!(shape("model.layers.0.mlp.down_proj.scales")[..], [45, 2048]);
        assert_eq!(shape("model.layers.0.mlp.down_proj.qweight")[..], [5664 * 3 / 32, 2048]);
        assert_eq!(shape("model.layers.0.self_attn.k_proj.qzeros")[..], [16, 256 * 3 / 32]);
        check_quantizable(&config, &quant(3, Some(128))).unwrap();
    }

    #[test]
    fn codes_that_do_not_fill_words_are_refused_by_name() {
        let mut config = ModelConfig::preset("tinyllama-1.1b").unwrap();
        config.intermediate_size = 5632 + 8;
        check_quantizable(&config, &quant(4, Some(128))).unwrap();
        let message = check_quantizable(&config, &quant(3, Some(128))).unwrap_err().to_string();
        assert_eq!(message, "mlp.gate_proj: 3 bits need out_features to be a multiple of 32, got 5640");
        assert!(check_quantizable(&config, &quant(2, None)).is_err());
        assert!(check_quantizable(&config, &quant(5, None)).is_err(), "settings are checked first");
    }

    #[test]
    fn biases_norms_and_ties_follow_the_config() {
        let llama = ModelConfig::preset("tinyllama-1.1b").unwrap();
        let config = ModelConfig {
            qkv_bias: true,
            qk_norm: crate::config::QkNormKind::Head,
            tie_word_embeddings: true,
            ..llama
        };
        let has = |specs: &[TensorSpec], name: &str| specs.iter().any(|s| s.name == name);
        let specs = checkpoint_tensors(&config);
        assert!(has(&specs, "model.layers.21.self_attn.q_norm.weight"));
        assert!(has(&specs, "model.layers.0.self_attn.v_proj.bias"));
        assert!(!has(&specs, "model.layers.0.self_attn.o_proj.bias"));
        assert!(!has(&specs, "lm_head.weight"));
        let specs = artifact_tensors(&config, &quant(4, Some(128)), false);
        assert!(has(&specs, "model.layers.0.self_attn.v_proj.bias"), "a real bias stays");
        assert!(!has(&specs, "model.layers.0.mlp.up_proj.weight"));
    }
}
