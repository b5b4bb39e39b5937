//! From the keys of a JSON object to [`QuantConfig`], liberal about who wrote it.

use super::{CheckpointFormat, QuantConfig};
use crate::config::fields::Fields;
use crate::{Error, Result};

/// AutoGPTQ keeps everything at the top, GPTQModel keeps some of it in `meta`.
pub(super) fn parse(fields: Fields) -> Result<QuantConfig> {
    refuse_other_kinds(fields)?;
    let meta = fields.object("meta", "meta.")?;
    let defaults = QuantConfig::default();
    let flag = |key, default| match (fields.boolean(key)?, meta) {
        (None, Some(meta)) => Ok::<_, Error>(meta.boolean(key)?.unwrap_or(default)),
        (value, _) => Ok(value.unwrap_or(default)),
    };
    let damp = match (fields.float("damp_percent")?, meta) {
        (None, Some(meta)) => meta.float("damp_percent")?,
        (damp, _) => damp,
    };
    let bits = fields.required("bits", fields.integer("bits")?)?;
    let config = QuantConfig {
        bits: bits.try_into().map_err(|_| fields.invalid("bits", "2, 3, 4 or 8"))?,
        group_size: group_size(fields)?,
        damp_percent: damp.unwrap_or(defaults.damp_percent),
        act_order: flag("desc_act", defaults.act_order)?,
        static_groups: flag("static_groups", defaults.static_groups)?,
        sym: flag("sym", defaults.sym)?,
        true_sequential: flag("true_sequential", defaults.true_sequential)?,
        format: format(fields)?,
    };
    match config.validate() {
        Err(Error::QuantSetting { key, expected, .. }) => Err(fields.invalid(key, expected)),
        checked => checked.map(|()| config),
    }
}

/// Files that are no plain GPTQ would be read as nonsense: they are refused by what they are.
fn refuse_other_kinds(fields: Fields) -> Result<()> {
    for key in ["quant_method", "method"] {
        if fields.string(key)?.is_some_and(|method| method != "gptq") {
            return Err(fields.invalid(key, "gptq"));
        }
    }
    for key in ["is_marlin_format", "lm_head"] {
        if fields.boolean(key)? == Some(true) {
            return Err(fields.invalid(key, "false, the only supported value"));
        }
    }
    if fields.value("dynamic").is_some_and(|rules| rules.as_object().is_none_or(|rules| !rules.is_empty())) {
        return Err(fields.invalid("dynamic", "nothing: settings per module are not supported"));
    }
    if fields.string("pack_dtype")?.is_some_and(|dtype| dtype != "int32") {
        return Err(fields.invalid("pack_dtype", "int32"));
    }
    Ok(())
}

fn group_size(fields: Fields) -> Result<Option<usize>> {
    match fields.value("group_size") {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => fields.required("group_size", fields.integer("group_size")?).map(Some),
    }
}

fn format(fields: Fields) -> Result<CheckpointFormat> {
    let key = if fields.value("checkpoint_format").is_some() { "checkpoint_format" } else { "format" };
    match fields.string(key)? {
        None | Some("gptq") => Ok(CheckpointFormat::Gptq),
        Some("gptq_v2") => Ok(CheckpointFormat::GptqV2),
        Some(_) => Err(fields.invalid(key, "gptq or gptq_v2")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(json: Value) -> Result<QuantConfig> {
        parse(Fields::new(&json, Path::new("c"), "")?)
    }

    #[test]
    fn what_is_no_plain_gptq_is_refused_by_name() {
        let cases = [
            (json!({"quant_method": "awq"}), r#"quant_method: expected gptq, got "awq""#),
            (json!({"bits": 5}), "bits: expected 2, 3, 4 or 8, got 5"),
            (json!({"bits": null}), "bits: expected a value, got null"),
            (json!({"group_size": 0}), "group_size: expected -1 or above 0, got 0"),
            (json!({"group_size": -2}), "group_size: expected a whole number, 0 or more, got -2"),
            (json!({"checkpoint_format": "marlin"}), r#"expected gptq or gptq_v2, got "marlin""#),
            (json!({"is_marlin_format": true}), "is_marlin_format: expected false"),
            (json!({"lm_head": true}), "lm_head: expected false"),
            (json!({"dynamic": {"+:.*": {"bits": 8}}}), "dynamic: expected nothing"),
            (json!({"desc_act": 1}), "desc_act: expected true or false, got 1"),
            (json!({"damp_percent": 1.5}), "damp_percent: expected above 0, below 1, got 1.5"),
        ];
        for (change, expected) in cases {
            let mut json = json!({"bits": 4, "group_size": 128});
            json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let message = read(json).unwrap_err().to_string();
            assert!(message.contains("c: ") && message.contains(expected), "{message}");
        }
    }
}
