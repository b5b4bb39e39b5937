//! What the code of a family fixes, beside what its `config.json` says: names, places of norms, defaults.

mod table;

use gptq_kernels::{Activation, Pairing, RouterScores};

pub(super) use table::FAMILIES;

/// A family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Phi3,
    Gemma2,
    Gemma3,
    Olmo2,
    Olmo3,
    SmolLm3,
    Glm4,
    Granite,
    Ernie45,
    SeedOss,
    Ministral3,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    Glm4Moe,
}

/// The norms of a layer: names inside the layer, `None` where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NormNames {
    /// Of what the attention reads.
    pub before_attention: Option<&'static str>,
    /// Of what it adds to the residual stream.
    pub after_attention: Option<&'static str>,
    pub before_mlp: Option<&'static str>,
    pub after_mlp: Option<&'static str>,
}

/// Which features of q and k one norm covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormKind {
    None,
    /// Those of one head.
    Head,
    /// All heads together.
    AllHeads,
}

/// A yes or no of the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flag {
    Never,
    Always,
    /// A key, and what holds without it.
    Key(&'static str, bool),
}

/// Which layers see only a window of the tokens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    Never,
    /// All of them, where the config has a window; the default is for configs that lack the key.
    Everywhere(Option<usize>),
    /// With `use_sliding_window` alone: those of `layer_types`, else those that the rule names.
    OnDemand(Demand),
    /// Those of `layer_types`, else all but every n-th.
    AllButEvery(usize),
}

/// Windowed layers of a config without `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    /// From `max_window_layers` on.
    Later,
    /// Every second one before `max_window_layers`.
    EarlierEven,
    /// Those without rotation.
    Unrotated,
    All,
}

/// Names of an MLP with experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertNames {
    /// Module of the router, inside the layer.
    pub router: &'static str,
    /// What the experts' numbers follow.
    pub experts: &'static str,
    /// Of gate, up and down inside an expert.
    pub linears: [&'static str; 3],
    /// An MLP for all tokens beside them.
    pub shared: Option<&'static str>,
    /// The linear whose sigmoid weighs the shared MLP.
    pub shared_gate: Option<&'static str>,
    /// What is added to the router's scores where experts are chosen.
    pub correction: Option<&'static str>,
    pub scores: RouterScores,
    /// Whether weights of the chosen are divided by their sum, without a key that says so.
    pub renormalise: bool,
    /// Layers without experts at the beginning, without a key that says so.
    pub dense_first: usize,
}

/// Values of keys that a config lacks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub context: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eps: f64,
    pub theta: f64,
    pub tied: bool,
    /// Share of a head that is rotated.
    pub rotary: f64,
    /// `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    pub score_cap: Option<f64>,
    pub logit_cap: Option<f64>,
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub architecture: Architecture,
    pub class_name: &'static str,
    pub model_type: &'static str,
    pub norms: NormNames,
    pub qk_norm: QkNormKind,
    /// The key that says whether there is such a norm at all.
    pub qk_norm_key: Option<&'static str>,
    /// q, k and v are one linear.
    pub fused_qkv: bool,
    /// gate and up are one linear.
    pub fused_gate_up: bool,
    pub pairing: Pairing,
    /// Gemma: norms multiply by `1 + weight`, embeddings by the root of their width, and `query_pre_attn_scalar` takes the
    /// place of `head_dim` in the scale of scores.
    pub gemma: bool,
    pub activation: Activation,
    pub qkv_bias: Flag,
    pub o_bias: Flag,
    pub mlp_bias: Flag,
    pub windows: Windows,
    /// The base of windowed layers, which scaling leaves alone, where it is one of their own.
    pub local_theta: Option<f64>,
    pub experts: Option<&'static ExpertNames>,
    /// Keys that change a result in this family, and would be refused in another.
    pub keys: &'static [&'static str],
    pub defaults: Defaults,
}

impl Architecture {
    pub(super) fn family(self) -> &'static Family {
        // The table is in the order of the enum, which a test asks for.
        &FAMILIES[self as usize]
    }

    /// The entry of `architectures`.
    pub fn class_name(self) -> &'static str {
        self.family().class_name
    }

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        self.family().model_type
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_stands_at_its_own_place() {
        for (place, family) in FAMILIES.iter().enumerate() {
            assert_eq!(family.architecture as usize, place, "{}", family.model_type);
        }
    }
}
