//! From the keys of a merged description to [`QuantConfig`], liberal about who wrote it.

use serde_json::Value;

use super::modules::ModuleRules;
use super::{CheckpointFormat, QuantConfig};
use crate::config::fields::Fields;
use crate::{Error, Result};

/// Reads what decides the numbers of a file and refuses by name what it does not implement.
pub(super) fn parse(fields: Fields) -> Result<QuantConfig> {
    refuse_other_kinds(fields)?;
    let defaults = QuantConfig::default();
    let flag = |key, default| Ok::<_, Error>(fields.boolean(key)?.unwrap_or(default));
    let bits = fields.required("bits", fields.integer("bits")?)?;
    let config = QuantConfig {
        bits: bits.try_into().map_err(|_| fields.invalid("bits", "2, 3, 4 or 8"))?,
        group_size: group_size(fields)?,
        // Of the past: a file can be read whatever it says.
        damp_percent: fields.float("damp_percent")?.unwrap_or(defaults.damp_percent),
        act_order: flag("desc_act", defaults.act_order)?,
        static_groups: flag("static_groups", defaults.static_groups)?,
        sym: flag("sym", defaults.sym)?,
        true_sequential: flag("true_sequential", defaults.true_sequential)?,
        format: format(fields)?,
        modules: ModuleRules::parse(fields)?,
    };
    match config.validate_shape() {
        Err(Error::QuantSetting { key, expected, .. }) => Err(fields.invalid(key, expected)),
        checked => checked.map(|()| config),
    }
}

/// Keys by which other quantizers are known, where `quant_method` does not name them.
const OTHERS: [(&str, &str); 7] = [
    ("load_in_4bit", "bitsandbytes"),
    ("load_in_8bit", "bitsandbytes"),
    ("bnb_4bit_quant_type", "bitsandbytes"),
    ("w_bit", "AWQ"),
    ("zero_point", "AWQ"),
    ("config_groups", "compressed-tensors"),
    ("weight_block_size", "fp8"),
];

/// Whether a value is one that is read.
type Allowed = fn(&Value) -> bool;

/// Settings that change what a file's numbers mean, and what each must be.
const FIXED: [(&str, Allowed, &str); 7] = [
    ("is_marlin_format", is_off, "false, the only supported value"),
    ("lm_head", is_off, "false, the only supported value: a quantized head is not supported"),
    ("adapter", is_off, "nothing: adapters are not supported"),
    ("rotation", is_off, "nothing: rotated weights are not supported"),
    ("pack_dtype", |v| v == "int32", "int32"),
    ("data_type", |v| v == "int", "int"),
    (
        "act_bits",
        |v| v.as_f64().is_some_and(|bits| bits >= 16.0),
        "16: quantized activations are not supported",
    ),
];

fn is_off(value: &Value) -> bool {
    match value {
        Value::Bool(value) => !value,
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Files that are no plain GPTQ would be read as nonsense: they are refused by what they are.
fn refuse_other_kinds(fields: Fields) -> Result<()> {
    match fields.string("quant_method")? {
        Some("gptq") => {}
        Some(_) => return Err(fields.invalid("quant_method", "gptq")),
        None => {
            let says = |key: &str| fields.value(key).is_some_and(|value| value != &Value::Bool(false));
            if let Some((key, name)) = OTHERS.into_iter().find(|(key, _)| says(key)) {
                return Err(fields.invalid(key, format!("weights of GPTQ, not of {name}")));
            }
        }
    }
    for (key, allowed, expected) in FIXED {
        if fields.value(key).is_some_and(|value| !allowed(value)) {
            return Err(fields.invalid(key, expected));
        }
    }
    Ok(())
}

/// -1 is one group a row.
pub(super) fn group_size(fields: Fields) -> Result<Option<usize>> {
    match fields.value("group_size") {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => fields.required("group_size", fields.integer("group_size")?).map(Some),
    }
}

fn format(fields: Fields) -> Result<CheckpointFormat> {
    match fields.string("checkpoint_format")? {
        None | Some("gptq") => Ok(CheckpointFormat::Gptq),
        Some("gptq_v2") => Ok(CheckpointFormat::GptqV2),
        Some(_) => Err(fields.invalid("checkpoint_format", "gptq or gptq_v2")),
    }
}
