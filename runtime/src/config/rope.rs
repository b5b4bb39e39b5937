//! Rotary embedding keys of old and new configs.

use super::RopeScaling;
use super::fields::Fields;
use crate::Result;

/// Base and scaling.
/// New configs keep everything in `rope_parameters`; old ones have `rope_theta` beside `rope_scaling`.
pub(super) fn rope(config: Fields) -> Result<(f64, RopeScaling)> {
    let parameters = match config.object("rope_parameters", "rope_parameters.")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling", "rope_scaling.")?,
    };
    for fields in parameters.into_iter().chain([config]) {
        if fields.float("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(fields.invalid("partial_rotary_factor", "1, the only supported value"));
        }
    }
    let own_theta = parameters.map(|p| p.float("rope_theta")).transpose()?.flatten();
    let theta = match own_theta {
        Some(theta) => theta,
        None => config.float("rope_theta")?.unwrap_or(10000.0),
    };
    Ok((theta, parameters.map(rope_scaling).transpose()?.unwrap_or(RopeScaling::None)))
}

fn rope_scaling(rope: Fields) -> Result<RopeScaling> {
    let key = if rope.value("rope_type").is_some() { "rope_type" } else { "type" };
    let positive = |key: &str| match rope.float(key)? {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err(rope.invalid(key, "a number above 0")),
    };
    match rope.string(key)? {
        None if rope.value("factor").is_none() => Ok(RopeScaling::None),
        Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: positive("factor")? }),
        Some("llama3") => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if low >= high {
                return Err(rope.invalid("high_freq_factor", format!("above low_freq_factor {low}")));
            }
            let context = "original_max_position_embeddings";
            Ok(RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: match rope.integer(context)? {
                    Some(tokens) if tokens > 0 => tokens,
                    _ => return Err(rope.invalid(context, "a number above 0")),
                },
            })
        }
        _ => Err(rope.invalid(key, "default, linear or llama3")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(config: Value) -> Result<(f64, RopeScaling)> {
        rope(Fields::new(&config, Path::new("c"), "").unwrap())
    }

    #[test]
    fn both_ages_of_rope_keys_are_read() {
        let rope = |config| read(config).unwrap();
        let linear = RopeScaling::Linear { factor: 4.0 };
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}});
        assert_eq!(rope(old), (5e5, linear));
        let new = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}});
        assert_eq!(rope(new), (5e5, linear));
        assert_eq!(rope(json!({"rope_theta": 5e5, "rope_scaling": null})), (5e5, RopeScaling::None));
        assert_eq!(rope(json!({"rope_parameters": {"rope_type": "default"}})), (1e4, RopeScaling::None));
    }

    #[test]
    fn llama3s_scaling_is_read_in_full() {
        let mut config = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}});
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        assert_eq!(read(config.clone()).unwrap().1, expected);
        config["rope_scaling"]["high_freq_factor"] = json!(1);
        let message = read(config).unwrap_err().to_string();
        assert_eq!(message, "c: rope_scaling.high_freq_factor: expected above low_freq_factor 1, got 1");
    }

    #[test]
    fn other_rotations_are_refused_by_name() {
        let cases = [
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 4}}),
                r#"rope_scaling.type: expected default, linear or llama3, got "yarn""#,
            ),
            (
                json!({"rope_scaling": {"factor": 4}}),
                "rope_scaling.type: expected default, linear or llama3, got nothing",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0}}),
                "factor: expected a number above 0, got 0",
            ),
            (
                json!({"rope_scaling": {"type": "llama3"}}),
                "low_freq_factor: expected a number above 0, got nothing",
            ),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor: expected 1"),
        ];
        for (config, expected) in cases {
            let message = read(config).unwrap_err().to_string();
            assert!(message.contains(expected), "expected {expected}, got {message}");
        }
    }
}
