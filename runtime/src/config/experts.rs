//! The keys of a mixture of experts.

use super::families::{ExpertNames, Family};
use super::fields::Fields;
use crate::Result;

/// What the layers with experts have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    pub count: usize,
    /// Experts that a token goes to.
    pub per_token: usize,
    /// Features between an expert's gate, up and down.
    pub width: usize,
    /// The same of the MLP that all tokens go through beside; 0 where there is none.
    pub shared_width: usize,
    /// For every layer whether it has experts; the others have one MLP.
    pub layers: Vec<bool>,
    /// Weights of the chosen are divided by their sum.
    pub renormalise: bool,
    /// Groups of neighbouring experts, and how many of them a token may choose from.
    pub groups: usize,
    pub groups_kept: usize,
    /// What weights are multiplied by at last.
    pub factor: f64,
}

/// Experts of a layer at most: no model has more than some hundred.
const MOST: usize = 1 << 12;

/// Experts of all layers at most, each of which has names of its own: known models have up to 16,000.
const MOST_IN_ALL: usize = 1 << 16;

/// Features of an MLP at most.
const WIDEST: usize = 1 << 22;

pub(super) fn experts(config: Fields, family: &Family, layers: usize) -> Result<Option<ExpertsConfig>> {
    let Some(names) = family.experts else { return Ok(None) };
    let count = count(config)?;
    if count.saturating_mul(layers) > MOST_IN_ALL {
        return Err(config
            .invalid("num_hidden_layers", format!("at most {}, with {count} experts", MOST_IN_ALL / count)));
    }
    let integer = |key| config.required(key, config.integer(key)?);
    let within = |key: &str, value: usize, most: usize| match (1..=most).contains(&value) {
        true => Ok(value),
        false => Err(config.invalid(key, format!("1 to {most}"))),
    };
    let per_token = within("num_experts_per_tok", integer("num_experts_per_tok")?, count)?;
    let width = match config.integer("moe_intermediate_size")? {
        Some(width) => within("moe_intermediate_size", width, WIDEST)?,
        None => integer("intermediate_size")?,
    };
    let shared_width = match (names.shared, config.integer("shared_expert_intermediate_size")?) {
        (None, _) => 0,
        (Some(_), Some(width)) => within("shared_expert_intermediate_size", width, WIDEST)?,
        (Some(_), None) => {
            width.saturating_mul(within("n_shared_experts", integer("n_shared_experts")?, MOST)?)
        }
    };
    if shared_width > WIDEST {
        return Err(config.invalid("n_shared_experts", format!("at most {}", WIDEST / width)));
    }
    let groups = config.integer("n_group")?.unwrap_or(1);
    if groups == 0 || !count.is_multiple_of(groups) || groups > 1 && count / groups < 2 {
        return Err(config.invalid("n_group", format!("a divisor of {count} experts, two or more a group")));
    }
    let groups_kept = within("topk_group", config.integer("topk_group")?.unwrap_or(1), groups)?;
    if per_token > groups_kept * (count / groups) {
        return Err(config.invalid("topk_group", format!("groups with {per_token} experts or more")));
    }
    let renormalise = config.boolean("norm_topk_prob")?.unwrap_or(names.renormalise);
    let factor = config.float("routed_scaling_factor")?.unwrap_or(1.0);
    let layers = sparse(config, names, layers)?;
    Ok(Some(ExpertsConfig {
        count,
        per_token,
        width,
        shared_width,
        layers,
        renormalise,
        groups,
        groups_kept,
        factor,
    }))
}

/// Families spell it in three ways.
fn count(config: Fields) -> Result<usize> {
    let mut count = None;
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        let Some(found) = config.integer(key)? else { continue };
        if !(1..=MOST).contains(&found) {
            return Err(config.invalid(key, format!("1 to {MOST}")));
        }
        if let Some(other) = count.filter(|other| *other != found) {
            return Err(config.invalid(key, format!("{other}, as another key says")));
        }
        count = Some(found);
    }
    config.required("num_experts", count)
}

/// Which layers have experts.
fn sparse(config: Fields, names: &ExpertNames, layers: usize) -> Result<Vec<bool>> {
    let step = config.integer("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(config.invalid("decoder_sparse_step", "1 or more"));
    }
    let first = config.integer("first_k_dense_replace")?.unwrap_or(names.dense_first);
    let mut sparse: Vec<bool> =
        (0..layers).map(|layer| layer >= first && (layer + 1).is_multiple_of(step)).collect();
    if let Some(dense) = config.value("mlp_only_layers") {
        let wrong = || config.invalid("mlp_only_layers", "a list of layers");
        for layer in dense.as_array().ok_or_else(wrong)? {
            let layer = layer.as_u64().ok_or_else(wrong)? as usize;
            if let Some(sparse) = sparse.get_mut(layer) {
                *sparse = false;
            }
        }
    }
    Ok(sparse)
}
