//! Which layers see only a window of the tokens before, and which are not rotated.

use serde_json::Value;

use super::families::{Demand, Family, Windows};
use super::fields::Fields;
use crate::Result;

/// The window, and for every layer whether it has it; no list where all layers have it. `unrotated` says which layers have
/// no rotation.
pub(super) fn windows(
    config: Fields,
    family: &Family,
    layers: usize,
    unrotated: &[bool],
) -> Result<(Option<usize>, Vec<bool>)> {
    match family.windows {
        // Transformers' classes have no window, whatever the config says.
        Windows::Never => Ok((None, vec![])),
        // Files always write the key: an unlimited window is an explicit null.
        Windows::Everywhere(default) if !config.has("sliding_window") => Ok((default, vec![])),
        Windows::Everywhere(_) => Ok((config.integer("sliding_window")?, vec![])),
        Windows::OnDemand(demand) => on_demand(config, demand, layers, unrotated),
        Windows::AllButEvery(n) => all_but_every(config, n, layers),
    }
}

/// Layers without rotation; an empty list where all are rotated.
pub(super) fn unrotated(config: Fields, family: &Family, layers: usize) -> Result<Vec<bool>> {
    let key = "no_rope_layers";
    if !family.keys.contains(&key) {
        return Ok(vec![]);
    }
    let unrotated = match config.value(key) {
        Some(list) => {
            let wrong = || config.invalid(key, format!("{layers} numbers, 0 or 1"));
            let list = list.as_array().filter(|list| list.len() == layers).ok_or_else(wrong)?;
            let unrotated = |value: &Value| match value.as_u64() {
                Some(rotates @ (0 | 1)) => Ok(rotates == 0),
                _ => Err(wrong()),
            };
            list.iter().map(unrotated).collect::<Result<Vec<_>>>()?
        }
        None => {
            let key = "no_rope_layer_interval";
            let interval = config.integer(key)?.unwrap_or(4);
            if interval == 0 {
                return Err(config.invalid(key, "1 or more"));
            }
            (0..layers).map(|layer| (layer + 1).is_multiple_of(interval)).collect()
        }
    };
    Ok(if unrotated.contains(&true) { unrotated } else { vec![] })
}

/// The window of a config that may lack the key.
fn window(config: Fields) -> Result<Option<usize>> {
    match config.has("sliding_window") {
        true => config.integer("sliding_window"),
        false => Ok(Some(4096)),
    }
}

fn on_demand(
    config: Fields,
    demand: Demand,
    layers: usize,
    unrotated: &[bool],
) -> Result<(Option<usize>, Vec<bool>)> {
    let wanted = config.boolean("use_sliding_window")?.unwrap_or(false);
    let Some(window) = window(config)?.filter(|_| wanted) else { return Ok((None, vec![])) };
    if demand == Demand::All {
        return Ok((Some(window), vec![]));
    }
    let windowed = match layer_types(config, layers)? {
        Some(windowed) => windowed,
        None => {
            let last = config.integer("max_window_layers")?.unwrap_or(28);
            let windowed = |layer: usize| match demand {
                Demand::Later => layer >= last,
                Demand::EarlierEven => layer.is_multiple_of(2) && layer < last,
                Demand::Unrotated => unrotated.get(layer).copied().unwrap_or(false),
                Demand::All => true,
            };
            (0..layers).map(windowed).collect()
        }
    };
    Ok(if windowed.contains(&true) { (Some(window), windowed) } else { (None, vec![]) })
}

fn all_but_every(config: Fields, n: usize, layers: usize) -> Result<(Option<usize>, Vec<bool>)> {
    let mut period = None;
    for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
        match config.integer(key)? {
            Some(0) => return Err(config.invalid(key, "1 or more")),
            found => period = period.or(found),
        }
    }
    let n = period.unwrap_or(n);
    let windowed = match layer_types(config, layers)? {
        Some(windowed) => windowed,
        None => (0..layers).map(|layer| !(layer + 1).is_multiple_of(n)).collect(),
    };
    // Without a window the list still says which layers are rotated by the base of windowed ones.
    Ok((window(config)?, windowed))
}

/// For every layer whether `layer_types` gives it a window; `None` without the key.
fn layer_types(config: Fields, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.value("layer_types") else { return Ok(None) };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| config.invalid("layer_types", format!("{layers} names")))?;
    let windowed = |name: &Value| match name.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(config.invalid("layer_types", "full_attention or sliding_attention")),
    };
    types.iter().map(windowed).collect::<Result<_>>().map(Some)
}
