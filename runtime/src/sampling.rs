//! Choosing the next token from logits, as transformers' `generate` does: repetition penalty, temperature,
//! top-k, top-p, then a draw.

use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha12Rng;

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

/// Draws tokens for one sequence; equal seeds give equal tokens.
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha12Rng,
}

impl Sampler {
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.check()?;
        Ok(Self { rng: ChaCha12Rng::seed_from_u64(params.seed), params })
    }

    /// The next token after `seen`.  logits: `[vocab]`
    pub fn next(&mut self, mut logits: Vec<f32>, seen: &[u32]) -> u32 {
        penalise(&mut logits, seen, self.params.repetition_penalty);
        if self.params.temperature == 0.0 {
            return argmax(&logits);
        }
        let mut candidates = self.candidates(&logits);
        let total = softmax(&mut candidates, self.params.temperature);
        truncate(&mut candidates, self.params.top_p * total);
        match WeightedIndex::new(candidates.iter().map(|c| c.1)) {
            Ok(weights) => candidates[weights.sample(&mut self.rng)].0,
            Err(_) => argmax(&logits),
        }
    }

    /// The `top_k` likeliest tokens with their logits, likeliest first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1);
        if (1..all.len()).contains(&self.params.top_k) {
            all.select_nth_unstable_by(self.params.top_k - 1, descending);
            all.truncate(self.params.top_k);
        }
        all.sort_unstable_by(descending);
        all
    }
}

fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// Logits to unnormalised probabilities; returns their sum.
fn softmax(candidates: &mut [(u32, f32)], temperature: f32) -> f32 {
    let largest = candidates.first().map_or(0.0, |c| c.1);
    candidates.iter_mut().for_each(|c| c.1 = ((c.1 - largest) / temperature).exp());
    candidates.iter().map(|c| c.1).sum()
}

/// Keeps the likeliest tokens up to and including the one that reaches `mass`.
fn truncate(candidates: &mut Vec<(u32, f32)>, mass: f32) {
    let mut sum = 0.0;
    let kept = candidates.iter().take_while(|c| {
        let open = sum < mass;
        sum += c.1;
        open
    });
    let kept = kept.count().max(1);
    candidates.truncate(kept);
}

/// The likeliest token, the first where several are.
fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(0, |best, (i, x)| if *x > logits[best] { i } else { best });
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 1 }
    }

    fn frequencies(params: SamplingParams, logits: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(params).unwrap();
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.next(logits.to_vec(), seen) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()];
        for (got, expected) in frequencies(params(), &logits, &[]).iter().zip([0.1, 0.2, 0.7]) {
            // Four standard deviations of 20,000 draws.
            assert!((got - expected).abs() < 0.014, "{got} for {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()];
        assert_eq!(frequencies(SamplingParams { top_k: 2, ..params() }, &logits, &[])[0], 0.0);
        let most = frequencies(SamplingParams { top_p: 0.69, ..params() }, &logits, &[]);
        assert_eq!(most[..2], [0.0, 0.0]);
        assert_eq!(frequencies(SamplingParams { top_p: 0.8, ..params() }, &logits, &[])[0], 0.0);
    }

    #[test]
    fn the_penalty_works_on_either_sign_and_once_a_token() {
        let greedy = SamplingParams { temperature: 0.0, repetition_penalty: 2.0, ..params() };
        let mut sampler = Sampler::new(greedy).unwrap();
        assert_eq!(sampler.next(vec![3.0, 2.0], &[0, 0, 0]), 1);
        assert_eq!(sampler.next(vec![-1.0, -1.5], &[0]), 1);
        assert_eq!(sampler.next(vec![3.0, 1.0], &[0, 0]), 0, "a repeated token is penalised once");
    }

    #[test]
    fn equal_seeds_give_equal_tokens() {
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params() }).unwrap();
            (0..50).map(|_| sampler.next(vec![0.0; 100], &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn meaningless_parameters_are_refused() {
        assert!(SamplingParams { temperature: -1.0, ..params() }.check().is_err());
        assert!(SamplingParams { temperature: f32::NAN, ..params() }.check().is_err());
        assert!(SamplingParams { top_p: 0.0, ..params() }.check().is_err());
        assert!(SamplingParams { repetition_penalty: 0.0, ..params() }.check().is_err());
    }
}
