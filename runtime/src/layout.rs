//! What a model of a given configuration is made of, before any file is opened: layers, groups of linears, tensors.
//! The model, the quantizer's walk, the artifact writer, `table`, `inspect` and `synth` all read these lists.

mod tensors;

pub use tensors::{
    StoredDtype, TensorSpec, artifact_tensors, check_quantizable, checkpoint_tensors, layer_tensors,
    other_tensors, outer_tensors,
};

use crate::config::{ExpertNames, ExpertsConfig, ModelConfig, QkNormKind};

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
    pub split: Split,
}

/// How a group's weights can be divided over devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Every device has all of them.
    Whole,
    /// Outputs of every linear in so many equal parts; the next group of the layer takes its inputs in the same parts.
    Columns { parts: usize },
    /// Inputs in so many equal parts; a device's product is one term of a sum over devices.
    Rows { parts: usize },
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
    if let (Some(experts), Some(names)) = (experts, config.family().experts) {
        layer.mixture(config, experts, names);
    } else {
        let shape = (GATE_UP_DOWN, config.intermediate_size);
        layer.groups.extend(mlp(config, Mlp::Whole, "mlp", shape, config.mlp_bias));
    }
    layer.norms(config);
    layer
}

/// The linears of all layers, each with its layer.
pub fn linears(config: &ModelConfig) -> Vec<(usize, LinearSpec)> {
    let of = |index| {
        let linears = layer(config, index).groups.into_iter().flat_map(|group| group.linears);
        linears.map(move |linear| (index, linear))
    };
    (0..config.num_hidden_layers).flat_map(of).collect()
}

/// Weights that one token is multiplied by: of experts, those that it is sent to.
pub fn active_weights(config: &ModelConfig) -> f64 {
    weights_read(config, 1)
}

/// Weights that so many tokens are multiplied by, where each goes to experts of its own choice: expected for routers that
/// choose evenly.
pub fn weights_read(config: &ModelConfig, tokens: usize) -> f64 {
    let share = config.experts.as_ref().map_or(1.0, |experts| {
        1.0 - (1.0 - experts.per_token as f64 / experts.count as f64).powi(tokens.min(1 << 20) as i32)
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
    let qkv = match config.family().fused_qkv {
        true => vec![of("qkv_proj", width + 2 * kv_width)],
        false => vec![of("q_proj", width), of("k_proj", kv_width), of("v_proj", kv_width)],
    };
    let o = LinearSpec::new("self_attn", "o_proj", [width, hidden], config.o_bias);
    let [columns, rows] = match config.qk_norm {
        // Such a norm has to see the heads of all devices.
        QkNormKind::AllHeads => [Split::Whole; 2],
        QkNormKind::Head | QkNormKind::None => Split::pair(config.num_key_value_heads),
    };
    vec![
        LinearGroup { role: Role::Qkv, linears: qkv, split: columns },
        LinearGroup { role: Role::O, linears: vec![o], split: rows },
    ]
}

/// Names of an MLP's linears, but for experts of some families.
const GATE_UP_DOWN: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

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
    let gate_up = match config.family().fused_gate_up {
        true => vec![of("gate_up_proj", [hidden, 2 * width])],
        false => vec![of(gate, [hidden, width]), of(up, [hidden, width])],
    };
    let down = vec![of(down, [width, hidden])];
    let [columns, rows] = Split::pair(width);
    [
        LinearGroup { role: Role::GateUp(which), linears: gate_up, split: columns },
        LinearGroup { role: Role::Down(which), linears: down, split: rows },
    ]
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
            let shape = (GATE_UP_DOWN, experts.shared_width);
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
        let names = config.family().norms;
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

    /// The place of the first group of a stage.
    pub fn first_of(&self, stage: Stage) -> Option<usize> {
        self.groups.iter().position(|group| group.role.stage() == stage)
    }

    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.groups.iter().flat_map(|group| &group.linears)
    }
}

impl Split {
    /// Of a group and the one that takes its outputs.
    fn pair(parts: usize) -> [Self; 2] {
        [Self::Columns { parts }, Self::Rows { parts }]
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
