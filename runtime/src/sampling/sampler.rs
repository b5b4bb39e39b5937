//! One sequence's choices: the parameters applied, then a draw.

use gptq_kernels::{Likeliest, MOST_CANDIDATES, largest};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha12Rng;

use super::{Adjustments, SamplingParams};
use crate::Result;

/// Draws tokens for one sequence; equal seeds give equal tokens.
pub struct Sampler {
    params: SamplingParams,
    adjustments: Adjustments,
    rng: ChaCha12Rng,
}

/// What penalties and their like do to logits.
enum Changes {
    None,
    /// Some become smaller, none larger.
    Lower,
    Any,
}

impl Sampler {
    pub fn new(params: SamplingParams) -> Result<Self> {
        Self::adjusted(params, Adjustments::default())
    }

    pub fn adjusted(params: SamplingParams, adjustments: Adjustments) -> Result<Self> {
        params.check()?;
        adjustments.check()?;
        Ok(Self { rng: ChaCha12Rng::seed_from_u64(params.seed), params, adjustments })
    }

    /// How many of the likeliest tokens are probably enough for [`Self::choose`]; `None` where all are needed.
    pub fn candidates(&self, vocab: usize) -> Option<usize> {
        let most = MOST_CANDIDATES.min(vocab);
        let SamplingParams { temperature, top_p, top_k, .. } = self.params;
        match self.changes() {
            Changes::Any => None,
            Changes::None if temperature == 0.0 => Some(1),
            _ if (1..=most).contains(&top_k) => Some(most),
            Changes::None => (top_k == 0 && top_p < 1.0).then_some(most),
            // What mass the others lose is not known.
            Changes::Lower => (temperature == 0.0).then_some(most),
        }
    }

    fn changes(&self) -> Changes {
        let Adjustments { typical_p, frequency_penalty, presence_penalty, ref logit_bias } = self.adjustments;
        let penalties = [self.params.repetition_penalty - 1.0, frequency_penalty, presence_penalty];
        match () {
            () if typical_p < 1.0 || !logit_bias.is_empty() || penalties.iter().any(|p| *p < 0.0) => {
                Changes::Any
            }
            () if penalties == [0.0; 3] => Changes::None,
            () => Changes::Lower,
        }
    }

    /// The temperature that the mass of all tokens is wanted for.
    pub fn temperature(&self) -> f32 {
        if self.params.temperature > 0.0 { self.params.temperature } else { 1.0 }
    }

    /// The next token after `seen`, of which the first `prompt` were not generated, from as many of the likeliest
    /// as [`Self::candidates`] asked for; `None` where that takes all after all.
    pub fn choose(&mut self, likeliest: &Likeliest, seen: &[u32], prompt: usize) -> Option<u32> {
        let mut candidates = likeliest.candidates.clone();
        if matches!(self.changes(), Changes::Lower) {
            // Below the last one there may be tokens that were not lowered.
            let surely = candidates.last()?.1;
            candidates.iter_mut().for_each(|(id, logit)| *logit = self.lowered(*id, *logit, seen, prompt));
            candidates.retain(|candidate| candidate.1 > surely);
            candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            if candidates.len() < self.params.top_k.max(1) {
                return None;
            }
        }
        if self.params.temperature == 0.0 {
            return candidates.first().map(|best| best.0);
        }
        let SamplingParams { temperature, top_p, top_k, .. } = self.params;
        candidates.truncate(if top_k > 0 { top_k } else { candidates.len() });
        let sum = softmax(&mut candidates, temperature);
        let mass = top_p * if top_k > 0 { sum } else { likeliest.total };
        if sum < mass {
            return None;
        }
        truncate(&mut candidates, mass);
        Some(self.draw(&candidates))
    }

    /// A logit after the penalties on what was seen and generated.
    fn lowered(&self, id: u32, mut logit: f32, seen: &[u32], prompt: usize) -> f32 {
        let times = seen[prompt.min(seen.len())..].iter().filter(|other| **other == id).count();
        if times > 0 {
            logit -= self.adjustments.taken_off(times);
        }
        if seen.contains(&id) { self.params.repeated(logit) } else { logit }
    }

    /// The next token after `seen`.  logits: `[vocab]`
    pub fn next(&mut self, logits: Vec<f32>, seen: &[u32]) -> u32 {
        self.next_after(logits, seen, 0)
    }

    /// The same where the first `prompt` tokens of `seen` were not generated.  logits: `[vocab]`
    pub fn next_after(&mut self, mut logits: Vec<f32>, seen: &[u32], prompt: usize) -> u32 {
        self.change(&mut logits, seen, &seen[prompt.min(seen.len())..]);
        if self.params.temperature == 0.0 {
            return argmax(&logits);
        }
        let count = if self.params.top_k > 0 { self.params.top_k } else { logits.len() };
        let mut candidates = largest(&logits, count);
        let total = softmax(&mut candidates, self.params.temperature);
        truncate(&mut candidates, self.params.top_p * total);
        if self.adjustments.typical_p < 1.0 {
            typical(&mut candidates, self.adjustments.typical_p);
        }
        self.draw(&candidates)
    }

    /// Bias and penalties on the logits of all tokens.
    fn change(&self, logits: &mut [f32], seen: &[u32], generated: &[u32]) {
        for (id, bias) in &self.adjustments.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        for (id, times) in counted(generated) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= self.adjustments.taken_off(times);
            }
        }
        for (id, _) in counted(seen) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = self.params.repeated(*logit);
            }
        }
    }

    /// One of the candidates by their weights; the first where those are no weights.
    fn draw(&mut self, candidates: &[(u32, f32)]) -> u32 {
        match WeightedIndex::new(candidates.iter().map(|c| c.1)) {
            Ok(weights) => candidates[weights.sample(&mut self.rng)].0,
            Err(_) => candidates.first().map_or(0, |c| c.0),
        }
    }
}

/// Every id once, and how often it is there.
fn counted(ids: &[u32]) -> Vec<(u32, usize)> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|same| (same[0], same.len())).collect()
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

/// Keeps the tokens whose surprise is nearest the entropy, up to and including the one that reaches `mass`.
fn typical(candidates: &mut Vec<(u32, f32)>, mass: f32) {
    let total: f32 = candidates.iter().map(|c| c.1).sum();
    let surprise = |weight: f32| -(weight / total).max(f32::MIN_POSITIVE).ln();
    let entropy: f32 = candidates.iter().map(|c| c.1 / total * surprise(c.1)).sum();
    let distance = |c: &(u32, f32)| (surprise(c.1) - entropy).abs();
    candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
    truncate(candidates, mass * total);
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
    fn generated_tokens_are_penalised_by_count_and_prompt_tokens_are_not() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let adjustments = Adjustments { frequency_penalty: 1.0, presence_penalty: 0.5, ..Default::default() };
        let mut sampler = Sampler::adjusted(greedy, adjustments).unwrap();
        assert_eq!(sampler.next_after(vec![3.0, 2.0], &[0, 0, 0], 3), 0);
        assert_eq!(sampler.next_after(vec![3.4, 2.0], &[0, 0, 0], 2), 1, "one of three was generated");
        assert_eq!(sampler.next_after(vec![3.6, 2.0], &[0, 0, 0], 2), 0);
    }

    #[test]
    fn typical_sampling_keeps_what_surprises_as_expected() {
        let mut candidates = vec![(0, 0.6), (1, 0.2), (2, 0.2)];
        typical(&mut candidates, 0.3);
        assert!(candidates.iter().all(|c| c.0 == 0), "entropy 0.95 is nearest to surprise 0.51");
    }

    #[test]
    fn meaningless_parameters_are_refused() {
        assert!(SamplingParams { temperature: -1.0, ..params() }.check().is_err());
        assert!(SamplingParams { temperature: f32::NAN, ..params() }.check().is_err());
        assert!(SamplingParams { top_p: 0.0, ..params() }.check().is_err());
        assert!(SamplingParams { repetition_penalty: 0.0, ..params() }.check().is_err());
    }

    #[test]
    fn the_likeliest_tokens_decide_as_all_of_them_do() {
        let vocab = 500;
        let logits = |step: u32| -> Vec<f32> {
            let mix = |i: u32| {
                (i.wrapping_mul(2_654_435_761) ^ step.wrapping_mul(40_503)).wrapping_mul(2_246_822_519)
            };
            (0..vocab).map(|i| mix(i) as f32 / u32::MAX as f32 * 12.0 - 4.0).collect()
        };
        let penalised =
            Adjustments { frequency_penalty: 0.3, presence_penalty: 0.2, ..Adjustments::default() };
        let mut decided = 0;
        for (risk, sampling, adjustments) in [
            ("greedy", SamplingParams { temperature: 0.0, ..params() }, Adjustments::default()),
            ("top k", SamplingParams { top_k: 20, temperature: 0.7, ..params() }, Adjustments::default()),
            ("top p", SamplingParams { top_p: 0.5, temperature: 0.4, ..params() }, Adjustments::default()),
            (
                "greedy and penalties",
                SamplingParams { temperature: 0.0, repetition_penalty: 1.3, ..params() },
                penalised.clone(),
            ),
            (
                "top k, top p and penalties",
                SamplingParams { top_k: 20, top_p: 0.9, repetition_penalty: 1.2, ..params() },
                penalised,
            ),
        ] {
            let sampler = || Sampler::adjusted(sampling.clone(), adjustments.clone()).unwrap();
            let (mut few, mut all) = (sampler(), sampler());
            let mut seen: Vec<u32> = (0..vocab).step_by(7).collect();
            for step in 0..60 {
                let logits = logits(step);
                let candidates = largest(&logits, few.candidates(vocab as usize).unwrap());
                let mass = |temperature: f32| {
                    logits.iter().map(|x| ((x - candidates[0].1) / temperature).exp()).sum()
                };
                let (total, plain_total) = (mass(few.temperature()), mass(1.0));
                let expected = all.next_after(logits.clone(), &seen, 70);
                match few.choose(&Likeliest { candidates, total, plain_total }, &seen, 70) {
                    Some(id) => assert_eq!(id, expected, "{risk}, step {step}"),
                    None => assert_eq!(few.next_after(logits, &seen, 70), expected, "{risk}, step {step}"),
                }
                decided += 1;
                seen.push(expected);
            }
        }
        assert_eq!(decided, 300);
        let bias = Adjustments { logit_bias: vec![(3, 1.0)], ..Adjustments::default() };
        let many = SamplingParams { top_k: 100, top_p: 0.9, ..params() };
        let many = Sampler::adjusted(many, Adjustments::default()).unwrap();
        assert_eq!(many.candidates(vocab as usize), None, "the mass is that of more than can be asked for");
        let biased = Sampler::adjusted(SamplingParams { temperature: 0.0, ..params() }, bias).unwrap();
        assert_eq!(biased.candidates(vocab as usize), None, "a bias may lift any token");
    }
}
