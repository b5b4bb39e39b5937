//! Rotary embedding keys of old and new configs, with transformers' precedence among them.

use super::families::{Architecture, Family};
use super::fields::Fields;
use crate::Result;

/// How rotary frequencies are changed for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Beyond `max_position_embeddings` tokens the base grows with the length of the sequence (NTK).
    Dynamic {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    Yarn(Yarn),
    LongRope(LongRope),
}

/// YaRN (Peng et al. 2023): low frequencies are divided by `factor`, high ones kept, those between blended.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// q and k are multiplied by it.
    pub attention_factor: f64,
    /// Whether the ends of the blend are rounded to whole features.
    pub truncate: bool,
}

/// LongRoPE (Ding et al. 2024): each frequency is divided by a factor of its own, from one list for sequences up to
/// `original_max_position_embeddings` tokens and from another for longer ones.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    pub short_factor: Vec<f64>,
    pub long_factor: Vec<f64>,
    /// As the config has it; it matters for `attention_factor` alone.
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    /// q and k are multiplied by it.
    pub attention_factor: f64,
}

/// Queries are multiplied by `1 + beta ln(1 + floor(position / original))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    pub beta: f64,
    pub original: usize,
}

impl RopeScaling {
    /// What q and k are multiplied by, beside being rotated.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.attention_factor,
            Self::LongRope(long) => long.attention_factor,
            Self::None | Self::Linear { .. } | Self::Dynamic { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// Tokens of a sequence at most. Llama 3 and LongRoPE count the stretch into `max_position_embeddings`.
    pub fn context_length(&self, max_position_embeddings: usize) -> usize {
        let stretched = |tokens: usize, factor: f64| ((tokens as f64 * factor) as usize).max(tokens);
        match self {
            Self::None | Self::Llama3 { .. } | Self::LongRope(_) => max_position_embeddings,
            Self::Linear { factor } | Self::Dynamic { factor } => stretched(max_position_embeddings, *factor),
            // Files give the stretched length or the original one.
            Self::Yarn(yarn) => {
                stretched(yarn.original_max_position_embeddings, yarn.factor).max(max_position_embeddings)
            }
        }
    }

    /// The longest sequence that has the frequencies of a short one; `None` where length changes nothing.
    pub fn longest_unscaled(&self, max_position_embeddings: usize) -> Option<usize> {
        match self {
            Self::Dynamic { .. } => Some(max_position_embeddings),
            Self::LongRope(long) => Some(long.original_max_position_embeddings),
            Self::None | Self::Linear { .. } | Self::Llama3 { .. } | Self::Yarn(_) => None,
        }
    }
}

/// The longest list of factors that is read: half of the largest head.
const MOST_FACTORS: usize = 1 << 13;

/// What a scaling may say. Another key would change the rotation in a way that is not known here.
const KNOWN: [&str; 17] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "partial_rotary_factor",
    // Says where a scaling came from.
    "finetuned",
];

/// How a model rotates q and k.
pub(super) struct Ropes {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// The base of windowed layers, where it is one of their own; nothing scales it.
    pub local_theta: Option<f64>,
    /// Share of a head's features that is rotated.
    pub rotary_factor: f64,
    pub query_growth: Option<QueryGrowth>,
}

/// `context` is `max_position_embeddings`.
///
/// As in transformers 5, a `rope_scaling` that is not empty takes the place of `rope_parameters` as a whole; the base is
/// the one inside it, else `rope_theta` beside it, else the family's.
pub(super) fn rope(config: Fields, family: &Family, context: usize, head_dim: usize) -> Result<Ropes> {
    let old = config.object("rope_scaling", "rope_scaling.")?.filter(|old| old.keys().next().is_some());
    let new = config.object("rope_parameters", "rope_parameters.")?;
    let (new, local) = match family.local_theta {
        Some(default) => by_layer_type(config, new, default)?,
        None => (new, None),
    };
    let parameters = old.or(new);
    let theta = |fields: Option<Fields>| fields.map_or(Ok(None), |fields| fields.float("rope_theta"));
    let own = match (theta(parameters)?, family.local_theta) {
        // By layer type, a scaling is laid over the parameters.
        (None, Some(_)) => theta(new)?,
        (own, _) => own,
    };
    let theta = match own {
        Some(theta) => theta,
        None => config.float("rope_theta")?.unwrap_or(family.defaults.theta),
    };
    let rotary_factor = rotary_factor(config, parameters, family, head_dim)?;
    let plain =
        Ropes { theta, scaling: RopeScaling::None, local_theta: local, rotary_factor, query_growth: None };
    let Some(parameters) = parameters else { return Ok(plain) };
    let known = |key: &&str| KNOWN.contains(key) || family.keys.contains(key);
    if let Some(key) = parameters.keys().find(|key| !known(key)) {
        return Err(parameters.invalid(key, "a key that this program knows"));
    }
    let rotated = rotated(head_dim, rotary_factor);
    let scaling = Scaling { rope: parameters, config, context, rotated, family };
    Ok(Ropes { scaling: scaling.read()?, query_growth: scaling.query_growth()?, ..plain })
}

/// Parameters of layers that see everything, and the base of windowed ones.
fn by_layer_type<'a>(
    config: Fields<'a>,
    parameters: Option<Fields<'a>>,
    default: f64,
) -> Result<(Option<Fields<'a>>, Option<f64>)> {
    let (mut full, mut local) = (None, None);
    if let Some(parameters) = parameters {
        let types = ["full_attention", "sliding_attention"];
        if let Some(key) = parameters.keys().find(|key| !types.contains(key)) {
            return Err(parameters.invalid(key, "full_attention and sliding_attention alone"));
        }
        full = parameters.object("full_attention", "rope_parameters.full_attention.")?;
        let sliding = parameters.object("sliding_attention", "rope_parameters.sliding_attention.")?;
        if let Some(sliding) = sliding {
            if sliding.string("rope_type")?.is_some_and(|kind| kind != "default") {
                return Err(sliding.invalid("rope_type", "default"));
            }
            local = sliding.float("rope_theta")?;
        }
    }
    let local = match local {
        Some(theta) => theta,
        None => config.float("rope_local_base_freq")?.unwrap_or(default),
    };
    Ok((full, Some(local)))
}

/// Features of a head that are rotated.
pub(super) fn rotated(head_dim: usize, factor: f64) -> usize {
    (head_dim as f64 * factor) as usize
}

/// The share of a head's features that is rotated, an even number of them.
fn rotary_factor(
    config: Fields,
    parameters: Option<Fields>,
    family: &Family,
    head_dim: usize,
) -> Result<f64> {
    let key = "partial_rotary_factor";
    for fields in parameters.into_iter().chain([config]) {
        let Some(factor) = fields.float(key)? else { continue };
        if factor != 1.0 && !family.keys.contains(&key) {
            return Err(fields.invalid(key, "1, the only value of this family"));
        }
        let rotated = rotated(head_dim, factor);
        if !(0.0..=1.0).contains(&factor) || rotated < 2 || !rotated.is_multiple_of(2) {
            let expected = format!("a share of 1 with an even number of {head_dim} features");
            return Err(fields.invalid(key, expected));
        }
        return Ok(factor);
    }
    Ok(family.defaults.rotary)
}

/// A scaling and what it depends on.
struct Scaling<'a> {
    rope: Fields<'a>,
    config: Fields<'a>,
    context: usize,
    rotated: usize,
    family: &'a Family,
}

impl Scaling<'_> {
    fn read(&self) -> Result<RopeScaling> {
        let rope = self.rope;
        let key = if rope.value("rope_type").is_some() { "rope_type" } else { "type" };
        match rope.string(key)? {
            None if rope.value("factor").is_none() => Ok(RopeScaling::None),
            Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.positive("factor")? }),
            Some("dynamic") => Ok(RopeScaling::Dynamic { factor: self.positive("factor")? }),
            Some("llama3") => self.llama3(),
            Some("yarn") if self.is_phi() => self.long_rope(),
            Some("yarn") => self.yarn(),
            Some("longrope") => self.long_rope(),
            // The first Phi-3 files.
            Some("su") if self.is_phi() => self.long_rope(),
            _ => Err(rope.invalid(key, "default, linear, dynamic, llama3, yarn or longrope")),
        }
    }

    fn is_phi(&self) -> bool {
        self.family.architecture == Architecture::Phi3
    }

    fn query_growth(&self) -> Result<Option<QueryGrowth>> {
        let key = "llama_4_scaling_beta";
        match self.family.keys.contains(&key) {
            true => {
                let beta = self.rope.required(key, self.rope.float(key)?)?;
                Ok(Some(QueryGrowth { beta, original: self.original_context()? }))
            }
            false => Ok(None),
        }
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if low >= high {
            return Err(self.rope.invalid("high_freq_factor", format!("above low_freq_factor {low}")));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.positive("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: self.original_context()?,
        })
    }

    fn yarn(&self) -> Result<RopeScaling> {
        let original = self.original_context()?;
        let factor = self.factor(original)?;
        // 0 means the default too.
        let beta = |key, default: f64| {
            Ok::<f64, crate::Error>(self.rope.float(key)?.filter(|beta| *beta != 0.0).unwrap_or(default))
        };
        let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
        if !(beta_slow > 0.0 && beta_fast >= beta_slow && beta_fast.is_finite()) {
            return Err(self.rope.invalid("beta_fast", format!("at least beta_slow {beta_slow}, above 0")));
        }
        let growth = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let given = |key| Ok::<_, crate::Error>(self.rope.float(key)?.filter(|scale| *scale != 0.0));
        let attention_factor = match (self.attention_factor()?, given("mscale")?, given("mscale_all_dim")?) {
            (Some(factor), _, _) => factor,
            (None, Some(one), Some(all)) => growth(one) / growth(all),
            _ => growth(1.0),
        };
        Ok(RopeScaling::Yarn(Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: self.rope.boolean("truncate")?.unwrap_or(true),
        }))
    }

    fn long_rope(&self) -> Result<RopeScaling> {
        let original = self.original_context()?;
        let factor = self.factor(original)?;
        let grown = || (1.0 + factor.ln() / (original as f64).ln()).sqrt();
        Ok(RopeScaling::LongRope(LongRope {
            short_factor: self.factors("short_factor")?,
            long_factor: self.factors("long_factor")?,
            factor,
            original_max_position_embeddings: original,
            attention_factor: match self.attention_factor()? {
                Some(factor) => factor,
                None if factor <= 1.0 || original < 2 => 1.0,
                None => grown(),
            },
        }))
    }

    fn positive(&self, key: &str) -> Result<f64> {
        match self.rope.float(key)? {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            _ => Err(self.rope.invalid(key, "a number above 0")),
        }
    }

    /// The one that is given, or how far the context was stretched.
    fn factor(&self, original: usize) -> Result<f64> {
        match self.rope.value("factor") {
            Some(_) => self.positive("factor"),
            None => Ok(self.context as f64 / original as f64),
        }
    }

    fn attention_factor(&self) -> Result<Option<f64>> {
        match self.rope.value("attention_factor") {
            Some(_) => self.positive("attention_factor").map(Some),
            None => Ok(None),
        }
    }

    /// The length before stretching: beside the scaling, else inside it, else `max_position_embeddings`.
    fn original_context(&self) -> Result<usize> {
        let key = "original_max_position_embeddings";
        for fields in [self.config, self.rope] {
            match fields.integer(key)? {
                Some(0) => return Err(fields.invalid(key, "a number above 0")),
                Some(tokens) => return Ok(tokens),
                None => {}
            }
        }
        match self.context {
            0 => Err(self.config.invalid("max_position_embeddings", "a number above 0")),
            context => Ok(context),
        }
    }

    /// A factor for each pair of a head's features that are rotated.
    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let pairs = self.rotated / 2;
        let wrong =
            || self.rope.invalid(key, format!("{pairs} numbers above 0, one for each pair of features"));
        let list = self.rope.value(key).and_then(|list| list.as_array()).ok_or_else(wrong)?;
        let list =
            Some(list).filter(|list| list.len() == pairs && pairs <= MOST_FACTORS).ok_or_else(wrong)?;
        let factor = |x: &serde_json::Value| x.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        list.iter().map(factor).collect::<Option<_>>().ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests;
