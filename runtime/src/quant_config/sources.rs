//! The two places where an artifact says how it was quantized, as one description.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config::fields::{Fields, read_json, shown};
use crate::{Error, Result};

const OWN_FILE: &str = "quantize_config.json";
const SECTION: &str = "quantization_config.";

/// Spellings of one key, the one that is kept first.
const SPELLINGS: [[&str; 2]; 2] = [["checkpoint_format", "format"], ["quant_method", "method"]];

/// Keys that GPTQModel keeps in `meta` and AutoGPTQ beside the others.
const IN_META: [&str; 5] = ["damp_percent", "static_groups", "true_sequential", "desc_act", "sym"];

/// Both descriptions, merged key by key.
pub(super) struct Sources {
    /// Where the first description is, for messages.
    pub path: PathBuf,
    /// Keys above it, as `quantization_config.`.
    pub parent: &'static str,
    pub merged: Map<String, Value>,
}

impl Sources {
    /// What the folder says; `None` where it says nothing.
    ///
    /// # Errors
    /// A file that cannot be read, and keys that contradict each other, with both values.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let (own_path, model_path) = (dir.join(OWN_FILE), dir.join("config.json"));
        let own = match own_path.exists() {
            true => Some(read_json(&own_path)?),
            false => None,
        };
        let model = match model_path.exists() {
            true => Some(read_json(&model_path)?),
            false => None,
        };
        let section = match &model {
            Some(model) => Fields::new(model, &model_path, "")?.object("quantization_config", SECTION)?,
            None => None,
        };
        let own = own.as_ref().map(|own| Fields::new(own, &own_path, "")).transpose()?;
        let (own, section) =
            (own.map(canonical).transpose()?, section.map(|section| canonical(section)).transpose()?);
        Ok(match (own, section) {
            (None, None) => None,
            (Some(own), None) => Some(Self { path: own_path, parent: "", merged: own }),
            (None, Some(section)) => Some(Self { path: model_path, parent: SECTION, merged: section }),
            (Some(own), Some(section)) => {
                let merged = merge(own, section, &model_path)?;
                Some(Self { path: own_path, parent: "", merged })
            }
        })
    }

    pub fn fields(&self) -> Fields<'_> {
        Fields::of_map(&self.merged, &self.path, self.parent)
    }
}

/// A description with one spelling of every key and nothing that says nothing.
fn canonical(fields: Fields) -> Result<Map<String, Value>> {
    let meta = fields.object("meta", "meta.")?;
    let said = fields.keys().filter_map(|key| Some((key.to_owned(), fields.value(key)?.clone())));
    let mut map: Map<String, Value> = said.collect();
    for [kept, other] in SPELLINGS {
        respell(&mut map, kept, other)
            .map_err(|first| fields.invalid(other, format!("{first} as under {kept}")))?;
    }
    for key in IN_META {
        if let (None, Some(value)) = (map.get(key), meta.and_then(|meta| meta.value(key))) {
            map.insert(key.into(), value.clone());
        }
    }
    Ok(map)
}

/// Keeps what stands under `other` under `kept`. The error is what stands there already, where that is something else.
fn respell(map: &mut Map<String, Value>, kept: &str, other: &str) -> std::result::Result<(), String> {
    let Some(value) = map.shift_remove(other) else { return Ok(()) };
    match map.get(kept) {
        Some(first) if !same(first, &value) => return Err(shown(Some(first))),
        Some(_) => {}
        None => drop(map.insert(kept.into(), value)),
    }
    Ok(())
}

fn merge(
    mut own: Map<String, Value>,
    section: Map<String, Value>,
    model_path: &Path,
) -> Result<Map<String, Value>> {
    for (key, value) in section {
        match own.get(&key) {
            None => {
                own.insert(key, value);
            }
            Some(first) if decides(&key) && !same(first, &value) => {
                return Err(Error::Config {
                    path: model_path.into(),
                    key: format!("{SECTION}{key}"),
                    expected: format!("{} as in {OWN_FILE}", shown(Some(first))),
                    got: shown(Some(&value)),
                });
            }
            Some(_) => {}
        }
    }
    Ok(own)
}

/// Whether a key decides what numbers a file holds. Others, as the damping, say how it was made, and may differ.
fn decides(key: &str) -> bool {
    const DECISIVE: [&str; 11] = [
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "checkpoint_format",
        "quant_method",
        "pack_dtype",
        "lm_head",
        "dynamic",
        "modules_in_block_to_quantize",
        "is_marlin_format",
    ];
    DECISIVE.contains(&key)
}

/// Equal values; numbers by what they are and not by how they are written.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
