//! What both dialects take: how tokens are drawn and what ends the text. Where a request says nothing the model's
//! generation_config.json counts, then what is neutral.

use std::collections::BTreeMap;

use gptq_runtime::engine::Task;
use gptq_runtime::sampling::{Adjustments, SamplingParams};
use gptq_text::StopStrings;
use serde::Deserialize;
use serde_json::Number;

use super::Call;
use super::error::ApiError;
use super::generation::GenerationParams;

#[derive(Deserialize, Default)]
pub struct Parameters {
    pub temperature: Option<f32>,
    pub top_k: Option<i64>,
    pub top_p: Option<f32>,
    pub typical_p: Option<f32>,
    pub min_p: Option<f32>,
    pub seed: Option<Number>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    #[serde(alias = "stop_sequences")]
    stop: Option<OneOrMany>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    #[serde(alias = "min_new_tokens")]
    min_tokens: Option<usize>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    pub best_of: Option<usize>,
}

/// A stop string, or a list of them.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Parameters {
    /// Whether something is asked for that only drawing can give.
    pub fn draw(&self) -> bool {
        let numbers = [self.temperature, self.top_p, self.typical_p, self.min_p];
        numbers.iter().any(Option::is_some) || self.top_k.is_some()
    }

    /// The plan for one prompt, within the limits. `max_new_tokens` is within them already; `end_of_turn` ends the text
    /// beside the model's own ends.
    pub fn plan(
        &self,
        call: &Call,
        prompt: Vec<u32>,
        max_new_tokens: usize,
        temperature: f32,
        end_of_turn: &[u32],
    ) -> Result<GenerationParams, ApiError> {
        let task = Task {
            min_new_tokens: self.min_new_tokens(call, max_new_tokens)?,
            eos_token_ids: self.ends(call, end_of_turn)?,
            adjustments: self.adjustments(call)?,
            ..Task::new(prompt, max_new_tokens, self.sampling(call, temperature)?)
        };
        let all_special = self.skip_special_tokens == Some(false);
        call.checked(GenerationParams { task, stops: self.stops(call)?, kept: &[], all_special })
    }

    fn sampling(&self, call: &Call, temperature: f32) -> Result<SamplingParams, ApiError> {
        let defaults = &call.defaults;
        let top_k = match self.top_k {
            None => defaults.top_k.unwrap_or(0),
            // As vLLM writes "all".
            Some(-1) => 0,
            Some(k) => usize::try_from(k)
                .map_err(|_| ApiError::validation(format!("top_k: expected -1 or more, got {k}")))?,
        };
        Ok(SamplingParams {
            temperature,
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k,
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            seed: self.seed.as_ref().map_or_else(|| Ok(super::clock_seed()), seed)?,
        })
    }

    fn adjustments(&self, call: &Call) -> Result<Adjustments, ApiError> {
        Ok(Adjustments {
            min_p: self.min_p.or(call.defaults.min_p).unwrap_or(0.0),
            typical_p: self.typical_p.or(call.defaults.typical_p).unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            logit_bias: logit_bias(self.logit_bias.as_ref())?,
        })
    }

    /// The ids that end the text.
    fn ends(&self, call: &Call, end_of_turn: &[u32]) -> Result<Vec<u32>, ApiError> {
        let asked = self.stop_token_ids.iter().flatten();
        if let Some(id) = asked.clone().find(|id| **id as usize >= call.vocab_size) {
            let vocab = call.vocab_size;
            return Err(ApiError::validation(format!(
                "stop_token_ids: expected less than {vocab}, got {id}"
            )));
        }
        let model = call.eos_token_ids.iter().chain(end_of_turn);
        let model = model.filter(|id| self.ignore_eos != Some(true) && (**id as usize) < call.vocab_size);
        Ok(asked.chain(model).copied().collect())
    }

    fn stops(&self, call: &Call) -> Result<StopStrings, ApiError> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        let (limit, got) = (call.limits.max_stop_sequences, stops.len());
        if got > limit {
            return Err(ApiError::validation(format!("stop: expected at most {limit} strings, got {got}")));
        }
        Ok(StopStrings::new(stops).include(self.include_stop_str_in_output.unwrap_or(false)))
    }

    fn min_new_tokens(&self, call: &Call, most: usize) -> Result<usize, ApiError> {
        match self.min_tokens {
            Some(least) if least > most => {
                Err(ApiError::validation(format!("min_tokens: expected at most {most}, got {least}")))
            }
            Some(least) => Ok(least),
            None => Ok(call.defaults.min_new_tokens.unwrap_or(0).min(most)),
        }
    }
}

/// Negative ones as OpenAI's clients send them.
fn seed(seed: &Number) -> Result<u64, ApiError> {
    let whole = seed.as_u64().or(seed.as_i64().map(|seed| seed as u64));
    whole.ok_or_else(|| ApiError::validation(format!("seed: expected a whole number, got {seed}")))
}

/// Ids as JSON's keys, which are strings.
fn logit_bias(given: Option<&BTreeMap<String, f32>>) -> Result<Vec<(u32, f32)>, ApiError> {
    let parsed = |(id, bias): (&String, &f32)| match id.parse() {
        Ok(id) => Ok((id, *bias)),
        Err(_) => Err(ApiError::validation(format!("logit_bias: expected token ids, got {id}"))),
    };
    given.into_iter().flatten().map(parsed).collect()
}
