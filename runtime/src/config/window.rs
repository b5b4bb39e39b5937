//! Which layers see only a window of the tokens before.

use super::Architecture;
use super::fields::Fields;
use crate::Result;

/// The window, and for every layer whether it has it; no list where all layers have it.
pub(super) fn windows(
    config: Fields,
    architecture: Architecture,
    layers: usize,
) -> Result<(Option<usize>, Vec<bool>)> {
    let window = config.integer("sliding_window")?;
    match architecture {
        // Transformers' Llama has no window, whatever the config says.
        Architecture::Llama => Ok((None, vec![])),
        // Transformers' default. It always writes the key: an unlimited window is an explicit null.
        Architecture::Mistral if !config.has("sliding_window") => Ok((Some(4096), vec![])),
        Architecture::Mistral => Ok((window, vec![])),
        Architecture::Qwen2 | Architecture::Qwen3 => qwen(config, layers),
    }
}

/// Qwen windows on demand only, and then the layers that `layer_types` names, or those from `max_window_layers` on.
fn qwen(config: Fields, layers: usize) -> Result<(Option<usize>, Vec<bool>)> {
    let wanted = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = match config.has("sliding_window") {
        true => config.integer("sliding_window")?,
        false => Some(4096),
    };
    let Some(window) = window.filter(|_| wanted) else { return Ok((None, vec![])) };
    let windowed = match config.value("layer_types") {
        Some(types) => {
            let types = types.as_array().filter(|types| types.len() == layers);
            let types = types.ok_or_else(|| config.invalid("layer_types", format!("{layers} names")))?;
            let windowed = |name: &serde_json::Value| match name.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(config.invalid("layer_types", "full_attention or sliding_attention")),
            };
            types.iter().map(windowed).collect::<Result<Vec<_>>>()?
        }
        None => {
            let first = config.integer("max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| layer >= first).collect()
        }
    };
    match windowed.contains(&true) {
        true => Ok((Some(window), windowed)),
        false => Ok((None, vec![])),
    }
}
