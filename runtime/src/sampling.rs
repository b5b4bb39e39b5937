//! How the next token is to be chosen, as transformers' `generate` does it: repetition penalty, temperature, top-k,
//! top-p, min-p, typical-p, then a draw. Devices choose, see [`gptq_kernels::Sample`]; here it is said by what.

mod probabilities;
mod sampler;

pub use probabilities::{TokenProbability, top_probabilities};
pub use sampler::Sampler;

use crate::{Error, Result};

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Smallest set of tokens with at least this much probability; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Above 1, tokens seen before become less likely (Keskar et al. 2019).
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl SamplingParams {
    /// The likeliest token, without any penalty.
    pub const fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0 }
    }

    /// Refuses values that mean nothing.
    pub fn check(&self) -> Result<()> {
        let bad = |name: &'static str, expected: &'static str, got: f32| {
            Err(Error::Parameter { name, expected, got })
        };
        match self {
            p if !(p.temperature >= 0.0 && p.temperature.is_finite()) => {
                bad("temperature", "0 or more", p.temperature)
            }
            p if !(p.top_p > 0.0 && p.top_p <= 1.0) => bad("top_p", "above 0, at most 1", p.top_p),
            p if !(p.repetition_penalty > 0.0 && p.repetition_penalty.is_finite()) => {
                bad("repetition_penalty", "above 0", p.repetition_penalty)
            }
            _ => Ok(()),
        }
    }
}

/// Further ways to change the odds, as serving APIs offer them; the default changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Adjustments {
    /// Keep the tokens that are at least this share as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest the expected one, up to this mass (Meister et al. 2022); 1
    /// keeps all.
    pub typical_p: f32,
    /// Taken off a generated token's logit for every time it was generated.
    pub frequency_penalty: f32,
    /// Taken off once where the token was generated at all.
    pub presence_penalty: f32,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Adjustments {
    fn default() -> Self {
        let logit_bias = Vec::new();
        Self { min_p: 0.0, typical_p: 1.0, frequency_penalty: 0.0, presence_penalty: 0.0, logit_bias }
    }
}

impl Adjustments {
    /// Refuses values that mean nothing.
    pub fn check(&self) -> Result<()> {
        let finite =
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)];
        if let Some((name, got)) = finite.into_iter().find(|(_, x)| !(-2.0..=2.0).contains(x)) {
            return Err(Error::Parameter { name, expected: "-2 to 2", got });
        }
        if let Some((_, got)) = self.logit_bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
            return Err(Error::Parameter { name: "logit_bias", expected: "-100 to 100", got: *got });
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::Parameter { name: "min_p", expected: "0 to 1", got: self.min_p });
        }
        if !(self.typical_p > 0.0 && self.typical_p <= 1.0) {
            return Err(Error::Parameter {
                name: "typical_p",
                expected: "above 0, at most 1",
                got: self.typical_p,
            });
        }
        Ok(())
    }

    /// What is taken off the logit of a token that was generated so many times.
    fn taken_off(&self, times: usize) -> f32 {
        self.presence_penalty + self.frequency_penalty * times as f32
    }
}
