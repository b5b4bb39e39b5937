//! How a text is to be generated: by the flags, then by the model's generation_config.json, then as a publisher's card
//! has it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::generate::GenerateParams;
use gptq_runtime::generation_config::GenerationConfig;
use gptq_runtime::sampling::{Adjustments, SamplingParams};
use gptq_text::tokenizer::Tokenizer;

use crate::args::SamplingArgs;

/// Tokens where neither a flag nor the model names a number.
const MAX_NEW_TOKENS: usize = 512;

/// What the card's snippet draws with, but for its penalty, which is off unless asked for.
const CARD: SamplingParams =
    SamplingParams { temperature: 0.7, top_p: 0.95, top_k: 40, repetition_penalty: 1.0, seed: 0 };

/// What a model's folder says.
pub struct GenerationDefaults {
    /// None where the model has no generation_config.json.
    config: Option<GenerationConfig>,
}

impl GenerationDefaults {
    /// Warns of settings that would change answers and are not applied.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = GenerationConfig::read(dir)?;
        if let Some(warning) = config.as_ref().and_then(GenerationConfig::warning) {
            tracing::warn!("{warning}");
        }
        Ok(Self { config })
    }

    /// What a server goes by.
    pub fn into_config(self) -> GenerationConfig {
        self.config.unwrap_or_default()
    }

    /// Without ids that end the text.
    pub fn params(&self, args: &SamplingArgs, max_new_tokens: Option<usize>) -> Result<GenerateParams> {
        let config = self.config.as_ref();
        let max_new_tokens = max_new_tokens.or_else(|| config?.max_new_tokens).unwrap_or(MAX_NEW_TOKENS);
        let (sampling, adjustments) = self.sampling(args);
        sampling.check()?;
        adjustments.check()?;
        let least = config.and_then(|config| config.min_new_tokens).unwrap_or(0);
        let params = GenerateParams::new(max_new_tokens, Vec::new(), sampling);
        Ok(GenerateParams { min_new_tokens: least.min(max_new_tokens), adjustments, ..params })
    }

    /// As transformers has it, a model with the file is asked greedily unless the file, or a flag, wants to draw.
    fn sampling(&self, args: &SamplingArgs) -> (SamplingParams, Adjustments) {
        let (sampling, adjustments) = match &self.config {
            None => (CARD, Adjustments::default()),
            Some(config) => {
                let numbers = [args.temperature, args.top_p, args.min_p, args.typical_p];
                let flags = numbers.iter().any(Option::is_some) || args.top_k.is_some();
                let draws = flags || config.do_sample == Some(true);
                let neutral = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
                let (mut sampling, adjustments) = config.over(neutral, Adjustments::default());
                if !draws {
                    sampling.temperature = 0.0;
                }
                (sampling, adjustments)
            }
        };
        let sampling = SamplingParams {
            temperature: args.temperature.unwrap_or(sampling.temperature),
            top_p: args.top_p.unwrap_or(sampling.top_p),
            top_k: args.top_k.unwrap_or(sampling.top_k),
            repetition_penalty: args.repetition_penalty.unwrap_or(sampling.repetition_penalty),
            seed: args.seed.unwrap_or_else(clock_seed),
        };
        let adjustments = Adjustments {
            min_p: args.min_p.unwrap_or(adjustments.min_p),
            typical_p: args.typical_p.unwrap_or(adjustments.typical_p),
            ..adjustments
        };
        (sampling, adjustments)
    }

    /// The ids that end a text; `marks` are those of a chat template.
    pub fn end_ids(&self, model: &ModelConfig, tokenizer: &Tokenizer, marks: &[String]) -> Vec<u32> {
        let marks = marks.iter().filter_map(|mark| tokenizer.token_id(mark));
        let of_text: Vec<_> = tokenizer.eos_id().into_iter().chain(marks).collect();
        match &self.config {
            Some(config) => config.end_ids(model, of_text),
            None => GenerationConfig::default().end_ids(model, of_text),
        }
    }
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_FLAGS: SamplingArgs = SamplingArgs {
        temperature: None,
        top_p: None,
        top_k: None,
        min_p: None,
        typical_p: None,
        repetition_penalty: None,
        seed: Some(1),
    };

    fn sampling(config: Option<&GenerationConfig>, args: &SamplingArgs) -> SamplingParams {
        GenerationDefaults { config: config.cloned() }.params(args, None).unwrap().sampling
    }

    #[test]
    fn without_a_file_the_card_counts_and_no_penalty_is_applied() {
        assert_eq!(sampling(None, &NO_FLAGS), SamplingParams { seed: 1, ..CARD });
        let args = SamplingArgs { temperature: Some(0.0), repetition_penalty: Some(1.2), ..NO_FLAGS };
        let expected = SamplingParams { temperature: 0.0, repetition_penalty: 1.2, seed: 1, ..CARD };
        assert_eq!(sampling(None, &args), expected);
    }

    #[test]
    fn the_file_counts_before_the_card_and_flags_before_the_file() {
        let file = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            repetition_penalty: Some(1.05),
            ..Default::default()
        };
        let got = sampling(Some(&file), &NO_FLAGS);
        assert_eq!((got.temperature, got.top_k, got.top_p, got.repetition_penalty), (0.6, 20, 1.0, 1.05));
        let args = SamplingArgs { top_k: Some(0), temperature: Some(0.9), ..NO_FLAGS };
        let got = sampling(Some(&file), &args);
        assert_eq!((got.temperature, got.top_k, got.repetition_penalty), (0.9, 0, 1.05));
    }

    #[test]
    fn a_file_that_does_not_want_to_draw_is_greedy_until_a_flag_does() {
        for do_sample in [None, Some(false)] {
            let file = GenerationConfig { do_sample, temperature: Some(0.6), ..Default::default() };
            assert_eq!(sampling(Some(&file), &NO_FLAGS).temperature, 0.0);
            let args = SamplingArgs { top_p: Some(0.9), ..NO_FLAGS };
            assert_eq!(sampling(Some(&file), &args).temperature, 0.6);
        }
        assert_eq!(sampling(Some(&GenerationConfig::default()), &NO_FLAGS).temperature, 0.0);
    }
}
