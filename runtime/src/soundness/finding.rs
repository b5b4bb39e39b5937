//! What can be amiss with a model folder.

use std::mem::{Discriminant, discriminant};

use crate::Error;
use crate::quant_config::CheckpointFormat;

/// Something amiss. Each is one line: where, expected, got.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// A tensor that is missing, or of another shape or type than the config says.
    #[error("{0}")]
    Tensor(Box<Error>),

    #[error(
        "{tensor}: packed weights, but neither quantize_config.json nor quantization_config in config.json says how they \
         were quantized (bits, group_size, desc_act); put the quantize_config.json of the model beside it"
    )]
    NoDescription { tensor: String },

    #[error(
        "{tensor}: expected weights of GPTQ, got those of AWQ, as quant_config.json says; they are not supported"
    )]
    Awq { tensor: String },

    #[error("quantization_config: expected packed weights (.qweight) as it describes, got none")]
    NoCodes,

    #[error("{module}: expected either .qweight or .weight, got both")]
    TwoWeights { module: String },

    #[error(
        "{module}: expected a floating-point .weight, as dynamic or modules_in_block_to_quantize say, got .qweight"
    )]
    UnexpectedCodes { module: String },

    #[error("{module}: not quantized, though the description does not say so; its .weight is used")]
    UnexpectedWeight { module: String },

    #[error(
        "{module}: expected g_idx, without which desc_act: true with group_size {group_size} cannot be read, got {got}"
    )]
    GroupsUnknown { module: String, group_size: i64, got: &'static str },

    #[error("{module}.g_idx: a placeholder; groups are taken in file order, as desc_act: false says")]
    GroupsPlaceholder { module: String },

    #[error("{module}.g_idx: groups are not in file order, though desc_act is false; g_idx is followed")]
    GroupsUnannounced { module: String },

    #[error("{module}.g_idx: expected groups 0 to {last}, got {got} at {place}")]
    GroupOutOfRange { module: String, last: usize, got: i32, place: usize },

    #[error("{module}.g_idx: expected {expected} features in group {group}, got {got}")]
    GroupSize { module: String, group: usize, expected: usize, got: usize },

    #[error(
        "{module}.qzeros: expected zero points as checkpoint_format {} has them, got those of {}",
        declared.name(),
        found.name()
    )]
    Zeros { module: String, declared: CheckpointFormat, found: CheckpointFormat },

    #[error(
        "{module}.qzeros: expected the middle code throughout, as sym: true says, got others; they are followed"
    )]
    ZerosNotMiddle { module: String },

    #[error("{module}.scales: expected finite scales, got {got} at {place}")]
    Scale { module: String, got: f32, place: usize },

    #[error("{module}.scales: not exactly f16; their own values are used, on a GPU by the slower product")]
    WideScales { module: String },

    #[error(
        "{module}.bias: expected none or zeros, as the config has no bias here (attention_bias, mlp_bias), got values"
    )]
    UnexpectedBias { module: String },

    #[error(
        "lm_head.weight: differs from the embedding, though tie_word_embeddings is true; the head of its own is used"
    )]
    OwnHead,
}

impl Finding {
    /// Whether numbers are right all the same.
    pub fn is_harmless(&self) -> bool {
        matches!(
            self,
            Self::UnexpectedWeight { .. }
                | Self::GroupsPlaceholder { .. }
                | Self::GroupsUnannounced { .. }
                | Self::ZerosNotMiddle { .. }
                | Self::WideScales { .. }
                | Self::OwnHead
        )
    }

    fn kind(&self) -> Discriminant<Self> {
        discriminant(self)
    }
}

/// One line for each kind, which names the first and counts the others.
pub fn summary(findings: &[Finding]) -> Vec<String> {
    let mut kinds: Vec<(&Finding, usize)> = Vec::new();
    for finding in findings {
        match kinds.iter_mut().find(|(first, _)| first.kind() == finding.kind()) {
            Some((_, more)) => *more += 1,
            None => kinds.push((finding, 0)),
        }
    }
    let line = |(first, more): (&Finding, usize)| match more {
        0 => first.to_string(),
        more => format!("{first} (and {more} more like it)"),
    };
    kinds.into_iter().map(line).collect()
}
