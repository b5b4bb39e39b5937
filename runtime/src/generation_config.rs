//! generation_config.json: how a model's publisher wants it to be asked, and what ends its texts.

use std::path::Path;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::config::fields::{Fields, read_json};
use crate::sampling::{Adjustments, SamplingParams};
use crate::{Error, Result};

const FILE_NAME: &str = "generation_config.json";

/// Settings that would change answers and are not implemented, with the values that leave answers as they are besides
/// `null`, `[]` and `{}`. What only matters to these, or to speed, is not listed.
const NOT_APPLIED: [(&str, f64); 24] = [
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("num_return_sequences", 1.0),
    ("penalty_alpha", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("diversity_penalty", 0.0),
    ("guidance_scale", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("top_h", 1.0),
    ("min_length", 0.0),
    ("bad_words_ids", NEVER),
    ("force_words_ids", NEVER),
    ("constraints", NEVER),
    ("suppress_tokens", NEVER),
    ("begin_suppress_tokens", NEVER),
    ("forced_bos_token_id", NEVER),
    ("forced_eos_token_id", NEVER),
    ("sequence_bias", NEVER),
    ("exponential_decay_length_penalty", NEVER),
    ("stop_strings", NEVER),
    ("watermarking_config", NEVER),
];

/// No number leaves answers as they are.
const NEVER: f64 = f64::NAN;

/// The settings that the file has. All are `None` or empty where there is no file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub typical_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
    pub min_new_tokens: Option<usize>,
    /// Ids that end a text, besides those that config.json names.
    pub eos_token_ids: Vec<u32>,
    /// Settings that would change answers and are not applied, with their values.
    pub not_applied: Vec<String>,
}

impl GenerationConfig {
    /// Reads the file of a model's folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Config`] names a key with a value that means nothing.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        match path.try_exists().map_err(Error::io(&path))? {
            true => Self::parse(&read_json(&path)?, &path).map(Some),
            false => Ok(None),
        }
    }

    fn parse(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields::new(value, path, "")?;
        let number = |key: &str, expected: &str, is: fn(f32) -> bool| -> Result<Option<f32>> {
            let value = fields.float(key)?.map(|value| value as f32);
            match value {
                Some(value) if !is(value) => Err(fields.invalid(key, expected)),
                value => Ok(value),
            }
        };
        let share = |x: f32| x > 0.0 && x <= 1.0;
        let config = Self {
            do_sample: fields.boolean("do_sample")?,
            temperature: number("temperature", "a number, 0 or more", |x| x >= 0.0 && x.is_finite())?,
            top_k: top_k(fields)?,
            top_p: number("top_p", "a number above 0, at most 1", share)?,
            min_p: number("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            typical_p: number("typical_p", "a number above 0, at most 1", share)?,
            repetition_penalty: number("repetition_penalty", "a number above 0", |x| {
                x > 0.0 && x.is_finite()
            })?,
            max_new_tokens: fields.integer("max_new_tokens")?,
            min_new_tokens: fields.integer("min_new_tokens")?,
            eos_token_ids: eos_token_ids(fields)?,
            not_applied: not_applied(fields),
        };
        match config.max_new_tokens {
            Some(0) => Err(fields.invalid("max_new_tokens", "a whole number, 1 or more")),
            _ => Ok(config),
        }
    }

    /// Whether the file itself says how tokens are drawn.
    pub fn draws(&self) -> bool {
        let numbers = [self.temperature, self.top_p, self.min_p, self.typical_p];
        self.do_sample.unwrap_or(numbers.iter().any(Option::is_some) || self.top_k.is_some())
    }

    /// The parameters that the file has, in place of those given.
    pub fn over(&self, sampling: SamplingParams, adjustments: Adjustments) -> (SamplingParams, Adjustments) {
        let sampling = SamplingParams {
            temperature: self.temperature.unwrap_or(sampling.temperature),
            top_p: self.top_p.unwrap_or(sampling.top_p),
            top_k: self.top_k.unwrap_or(sampling.top_k),
            repetition_penalty: self.repetition_penalty.unwrap_or(sampling.repetition_penalty),
            ..sampling
        };
        let adjustments = Adjustments {
            min_p: self.min_p.unwrap_or(adjustments.min_p),
            typical_p: self.typical_p.unwrap_or(adjustments.typical_p),
            ..adjustments
        };
        (sampling, adjustments)
    }

    /// The ids that end a text: config.json's, this file's, and those that the tokenizer and the chat template name. A
    /// tokenizer may have more tokens than a model has scores; ids beyond the vocabulary are left out.
    pub fn end_ids(&self, model: &ModelConfig, of_text: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let ids = model.eos_token_ids.iter().chain(&self.eos_token_ids).copied().chain(of_text);
        ids.filter(|id| (*id as usize) < model.vocab_size).collect()
    }

    /// One line on what the file asks for in vain; `None` where that is nothing.
    pub fn warning(&self) -> Option<String> {
        let settings = self.not_applied.join(", ");
        (!settings.is_empty()).then(|| format!("{FILE_NAME}: not supported and not applied: {settings}"))
    }
}

/// 0 and -1 keep all.
fn top_k(fields: Fields) -> Result<Option<usize>> {
    match fields.value("top_k").map(Value::as_i64) {
        None => Ok(None),
        Some(Some(-1)) => Ok(Some(0)),
        Some(Some(count @ 0..)) => Ok(Some(usize::try_from(count).unwrap_or(usize::MAX))),
        Some(_) => Err(fields.invalid("top_k", "a whole number, -1 or more")),
    }
}

/// One id or a list of them.
fn eos_token_ids(fields: Fields) -> Result<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match fields.value("eos_token_id") {
        None => Some(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| fields.invalid("eos_token_id", "a token id or a list of them"))
}

fn not_applied(fields: Fields) -> Vec<String> {
    let changes = |value: &Value, neutral: f64| match value {
        Value::Bool(asked) => *asked,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        value => value.as_f64() != Some(neutral),
    };
    let asked = NOT_APPLIED.iter().filter_map(|(key, neutral)| Some((key, fields.value(key)?, *neutral)));
    let asked = asked.filter(|(_, value, neutral)| changes(value, *neutral));
    asked.map(|(key, value, _)| format!("{key} {value}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<GenerationConfig> {
        GenerationConfig::parse(&value, Path::new("m/generation_config.json"))
    }

    #[test]
    fn one_id_and_several_end_a_text_and_other_things_are_refused_by_name() {
        let eos = |value| parse(json!({"eos_token_id": value})).map(|config| config.eos_token_ids);
        assert_eq!(eos(json!(7)).unwrap(), [7]);
        assert_eq!(eos(json!([0, 288])).unwrap(), [0, 288]);
        assert_eq!(eos(json!(null)).unwrap(), [0; 0]);
        for bad in [json!(-1), json!([1, "2"]), json!("7"), json!(true), json!(1.5), json!([[1]])] {
            let message = eos(bad).unwrap_err().to_string();
            assert!(
                message.starts_with("m/generation_config.json: eos_token_id: expected a token id"),
                "{message}"
            );
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused_by_name() {
        for (key, value) in [
            ("temperature", json!(-0.5)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1.1)),
            ("top_k", json!(-2)),
            ("top_k", json!(1.5)),
            ("min_p", json!(2)),
            ("typical_p", json!(0)),
            ("repetition_penalty", json!(0)),
            ("do_sample", json!("yes")),
            ("max_new_tokens", json!(0)),
            ("min_new_tokens", json!(-1)),
        ] {
            let message = parse(json!({key: value})).unwrap_err().to_string();
            assert!(message.starts_with(&format!("m/generation_config.json: {key}: expected")), "{message}");
            assert!(message.contains(&format!("got {value}")), "{message}");
        }
        assert!(parse(json!([])).is_err());
    }

    #[test]
    fn settings_are_read_and_null_is_no_setting() {
        let config =
            parse(json!({"do_sample": true, "temperature": 0.6, "top_k": -1, "top_p": 1, "typical_p": null,
            "transformers_version": "5.0.0", "_from_model_config": true}));
        let config = config.unwrap();
        assert_eq!((config.temperature, config.top_k, config.top_p), (Some(0.6), Some(0), Some(1.0)));
        assert_eq!((config.typical_p, config.warning()), (None, None));
        assert!(config.draws() && !parse(json!({"eos_token_id": 2})).unwrap().draws());
        assert!(parse(json!({"top_k": 20})).unwrap().draws());
        assert!(!parse(json!({"top_k": 20, "do_sample": false})).unwrap().draws());
    }

    #[test]
    fn what_would_change_answers_and_is_not_implemented_is_named() {
        let config = parse(json!({"num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [5],
            "penalty_alpha": 0.0, "bad_words_ids": [], "guidance_scale": null, "num_return_sequences": 1}));
        let warning = config.unwrap().warning().unwrap();
        assert!(warning.ends_with(": num_beams 4, no_repeat_ngram_size 3, suppress_tokens [5]"), "{warning}");
    }

    #[test]
    fn a_folder_without_the_file_has_no_settings() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(folder.path()).unwrap(), None);
        std::fs::write(folder.path().join(FILE_NAME), "{").unwrap();
        assert!(GenerationConfig::read(folder.path()).unwrap_err().to_string().contains("not valid JSON"));
    }
}
