//! Which tensors a checkpoint of a given configuration holds, before any file is opened.
//! `table`, the artifact writer, `inspect`, `synth` and the loaders all read this one list.

use gptq_kernels::Dtype;

use crate::config::{ExpertNames, ExpertsConfig, ModelConfig, QkNormKind};
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

/// One decoder layer: its linears by the inputs that they share, and its other tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// In the order in which a token passes them: q|k|v, o, then the MLP's.
    pub groups: Vec<LinearGroup>,
    /// Norms and what mixtures have beside linears: name inside the layer, and shape.
    pub others: Vec<(String, Vec<usize>)>,
    pub mlp: MlpKind,
}

/// What follows the attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    Dense,
    /// A mixture of so many experts, perhaps with an MLP for all tokens beside them.
    Experts {
        count: usize,
        shared: bool,
    },
}

/// Linears that share their input. They are stacked along `out`, and solved together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearGroup {
    pub role: Role,
    pub linears: Vec<LinearSpec>,
}

/// What a group of linears is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    Qkv,
    O,
    GateUp(Mlp),
    Down(Mlp),
}

/// One of a layer's MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mlp {
    /// The only one.
    Whole,
    Expert(usize),
    /// The one that all tokens go through beside the experts.
    Shared,
}

/// A part of the way through a layer, which begins with the input of some linears and ends with the next input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Qkv,
    O,
    GateUp,
    Down,
    /// Router and experts as a whole, in the place of gate_up and down.
    Mixture,
}

/// One linear of a layer: `self_attn.q_proj` and so on, with its dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module path inside the layer, e.g. `self_attn.q_proj`.
    pub module: String,
    pub in_features: usize,
    pub out_features: usize,
    pub bias: bool,
}

/// Layer `index` of a model.
pub fn layer(config: &ModelConfig, index: usize) -> LayerSpec {
    let mut layer = LayerSpec { groups: attention(config), others: Vec::new(), mlp: MlpKind::Dense };
    let experts = config.experts.as_ref().filter(|experts| experts.layers.get(index) == Some(&true));
    if let (Some(experts), Some(names)) = (experts, config.expert_names()) {
        layer.mixture(config, experts, names);
    } else {
        let names = ["gate_proj", "up_proj", "down_proj"];
        let width = config.intermediate_size;
        layer.groups.extend(mlp(config, Mlp::Whole, "mlp", (names, width), config.mlp_bias));
    }
    layer.norms(config);
    layer
}

/// The linears of all layers, each with its layer.
pub fn linears(config: &ModelConfig) -> Vec<(usize, LinearSpec)> {
    let layers = 0..config.num_hidden_layers;
    layers.flat_map(|index| layer(config, index).into_linears().map(move |linear| (index, linear))).collect()
}

/// Weights that one token is multiplied by: of experts, those that it is sent to.
pub fn active_weights(config: &ModelConfig) -> f64 {
    weights_read(config, 1)
}

/// Weights that so many tokens are multiplied by, where each goes to experts of its own choice: expected for routers that
/// choose evenly.
pub fn weights_read(config: &ModelConfig, tokens: usize) -> f64 {
    let share = config.experts.as_ref().map_or(1.0, |experts| {
        1.0 - (1.0 - experts.chosen as f64 / experts.count as f64).powi(tokens.min(1 << 20) as i32)
    });
    let weights = |group: &LinearGroup| {
        let (out, inputs) = group.dims();
        let expert = matches!(group.role, Role::GateUp(Mlp::Expert(_)) | Role::Down(Mlp::Expert(_)));
        (out * inputs) as f64 * if expert { share } else { 1.0 }
    };
    let layers = 0..config.num_hidden_layers;
    layers.map(|index| layer(config, index).groups.iter().map(weights).sum::<f64>()).sum()
}

fn attention(config: &ModelConfig) -> Vec<LinearGroup> {
    let hidden = config.hidden_size;
    let width = config.num_attention_heads * config.head_dim;
    let kv_width = config.num_key_value_heads * config.head_dim;
    let of = |name: &str, out_features| {
        LinearSpec::new("self_attn", name, [hidden, out_features], config.qkv_bias)
    };
    let qkv = match config.fuses_qkv() {
        true => vec![of("qkv_proj", width + 2 * kv_width)],
        false => vec![of("q_proj", width), of("k_proj", kv_width), of("v_proj", kv_width)],
    };
    let o = LinearSpec::new("self_attn", "o_proj", [width, hidden], config.o_bias);
    vec![LinearGroup { role: Role::Qkv, linears: qkv }, LinearGroup { role: Role::O, linears: vec![o] }]
}

/// Both groups of one MLP; `names` are those of gate, up and down.
fn mlp(
    config: &ModelConfig,
    which: Mlp,
    prefix: &str,
    (names, width): ([&str; 3], usize),
    bias: bool,
) -> [LinearGroup; 2] {
    let hidden = config.hidden_size;
    let of = |name: &str, shape| LinearSpec::new(prefix, name, shape, bias);
    let [gate, up, down] = names;
    let gate_up = match config.fuses_gate_up() {
        true => vec![of("gate_up_proj", [hidden, 2 * width])],
        false => vec![of(gate, [hidden, width]), of(up, [hidden, width])],
    };
    let down = vec![of(down, [width, hidden])];
    let group = |role, linears| LinearGroup { role, linears };
    [group(Role::GateUp(which), gate_up), group(Role::Down(which), down)]
}

impl LayerSpec {
    fn mixture(&mut self, config: &ModelConfig, experts: &ExpertsConfig, names: &ExpertNames) {
        let hidden = config.hidden_size;
        let shared = names.shared.filter(|_| experts.shared_width > 0);
        self.mlp = MlpKind::Experts { count: experts.count, shared: shared.is_some() };
        for index in 0..experts.count {
            let prefix = format!("{}.{index}", names.experts);
            let shape = (names.linears, experts.width);
            self.groups.extend(mlp(config, Mlp::Expert(index), &prefix, shape, false));
        }
        if let Some(shared) = shared {
            let shape = (["gate_proj", "up_proj", "down_proj"], experts.shared_width);
            self.groups.extend(mlp(config, Mlp::Shared, shared, shape, false));
        }
        self.others.push((format!("{}.weight", names.router), vec![experts.count, hidden]));
        if let Some(correction) = names.correction {
            self.others.push((correction.into(), vec![experts.count]));
        }
        if let Some(gate) = names.shared_gate {
            self.others.push((format!("{gate}.weight"), vec![1, hidden]));
        }
    }

    fn norms(&mut self, config: &ModelConfig) {
        let mut norm = |name: &str, size: usize| self.others.push((format!("{name}.weight"), vec![size]));
        let (q, k) = config.qk_norm_widths();
        if config.qk_norm != QkNormKind::None {
            norm("self_attn.q_norm", q);
            norm("self_attn.k_norm", k);
        }
        let names = config.norm_names();
        let all = [names.before_attention, names.after_attention, names.before_mlp, names.after_mlp];
        all.into_iter().flatten().for_each(|name| norm(name, config.hidden_size));
    }

    /// The stages in order.
    pub fn stages(&self) -> &'static [Stage] {
        match self.mlp {
            MlpKind::Dense => &[Stage::Qkv, Stage::O, Stage::GateUp, Stage::Down],
            MlpKind::Experts { .. } => &[Stage::Qkv, Stage::O, Stage::Mixture],
        }
    }

    /// The place of a group in [`Self::groups`].
    pub fn position(&self, role: Role) -> Option<usize> {
        self.groups.iter().position(|group| group.role == role)
    }

    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.groups.iter().flat_map(|group| &group.linears)
    }

    fn into_linears(self) -> impl Iterator<Item = LinearSpec> {
        self.groups.into_iter().flat_map(|group| group.linears)
    }
}

impl LinearGroup {
    /// `(out, in)` of the stacked linears.
    pub fn dims(&self) -> (usize, usize) {
        let out = self.linears.iter().map(|linear| linear.out_features).sum();
        (out, self.linears.first().map_or(0, |linear| linear.in_features))
    }
}

impl LinearSpec {
    fn new(prefix: &str, name: &str, [in_features, out_features]: [usize; 2], bias: bool) -> Self {
        Self { module: format!("{prefix}.{name}"), in_features, out_features, bias }
    }
}

impl Role {
    /// The stage in which the group is used.
    pub fn stage(self) -> Stage {
        match self {
            Self::Qkv => Stage::Qkv,
            Self::O => Stage::O,
            Self::GateUp(Mlp::Whole) => Stage::GateUp,
            Self::Down(Mlp::Whole) => Stage::Down,
            Self::GateUp(_) | Self::Down(_) => Stage::Mixture,
        }
    }

    /// For people, e.g. `gate_up of expert 3`.
    pub fn name(self) -> String {
        let (what, mlp) = match self {
            Self::Qkv => return "qkv".into(),
            Self::O => return "o".into(),
            Self::GateUp(mlp) => ("gate_up", mlp),
            Self::Down(mlp) => ("down", mlp),
        };
        match mlp {
            Mlp::Whole => what.into(),
            Mlp::Expert(index) => format!("{what} of expert {index}"),
            Mlp::Shared => format!("{what} of the shared expert"),
        }
    }
}

/// What names of the tensors of layer `index` start with: `model.layers.N.`.
pub fn layer_prefix(index: usize) -> String {
    format!("model.layers.{index}.")
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

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Mixture => "mixture",
        }
    }

    /// Its output is added to the residual stream.
    pub fn ends_block(self) -> bool {
        matches!(self, Self::O | Self::Down | Self::Mixture)
    }
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
    let first = config.norm_names().before_attention.map(|name| format!("{name}.weight"));
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
        let config =
            ModelConfig { qkv_bias: true, qk_norm: QkNormKind::Head, tie_word_embeddings: true, ..llama };
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
