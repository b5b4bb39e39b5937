use std::borrow::Cow;

use candle_core::Tensor;

use super::{FRACTION_BITS, ID_BITS, OCTAVES, RowSampling, SERIES, Sample, SampledToken, check};
use crate::cpu::{View, exp_in_place, map, maximum};
use crate::{Cpu, Device, Result};

/// Weights whose sum is made in f32.
const SUMMED: usize = 1024;

impl Sample for Cpu {
    type Sampled = Vec<Option<SampledToken>>;

    fn sample(&self, logits: &Tensor, sampling: &[RowSampling]) -> Result<Self::Sampled> {
        check(self.shape(logits), sampling)?;
        let logits = View::of(logits)?;
        let width = logits.columns;
        Ok(map(sampling.len(), |i| sampled_token(&logits[i * width..][..width], &sampling[i])))
    }

    fn sampled_tokens(&self, sampled: &Self::Sampled) -> Result<Vec<Option<SampledToken>>> {
        Ok(sampled.clone())
    }
}

fn sampled_token(row: &[f32], params: &RowSampling) -> Option<SampledToken> {
    let mut logits = Cow::Borrowed(row);
    for change in &params.changes {
        let logit = &mut logits.to_mut()[change.id as usize];
        *logit = change.of(*logit);
    }
    let likeliest = best(&logits)?;
    let id = match params.temperature {
        0.0 => likeliest,
        _ => sampled(&logits, logits[likeliest], params) as usize,
    };
    let logprob = if params.logprob { logprob(row, id)? } else { f32::NAN };
    Some(SampledToken { id: id as u32, logprob })
}

fn logprob(row: &[f32], id: usize) -> Option<f32> {
    // What is not finite weighs nothing.
    let finite = |x: &f32| if x.is_finite() { *x } else { f32::NEG_INFINITY };
    let mut weights: Vec<f32> = row.iter().map(finite).collect();
    let largest = maximum(&weights);
    let mut mass =
        || weights.chunks_mut(SUMMED).map(|some| f64::from(exp_in_place(some, largest))).sum::<f64>();
    largest.is_finite().then(|| row[id] - largest - mass().ln() as f32)
}

/// The largest finite score, the first where several are.
fn best(logits: &[f32]) -> Option<usize> {
    let largest = maximum(logits);
    if largest.is_finite() {
        return logits.iter().position(|x| *x == largest);
    }
    let finite = logits.iter().enumerate().filter(|(_, x)| x.is_finite());
    finite.reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(i, _)| i)
}

/// A token that can be drawn.
#[derive(Clone, Copy)]
struct Token {
    /// What tokens are looked through by: smaller first.
    order: u64,
    id: u32,
    /// Octaves below the likeliest.
    shortfall: u32,
}

impl Token {
    fn weight(&self) -> u64 {
        weight(self.shortfall)
    }

    fn ordered(self, first: u32) -> Self {
        Self { order: u64::from(first) << ID_BITS | u64::from(self.id), ..self }
    }
}

fn sampled(logits: &[f32], largest: f32, params: &RowSampling) -> u32 {
    let rate = params.rate();
    let token = |(id, logit): (u32, &f32)| {
        let shortfall = shortfall(largest, *logit, rate)?;
        Some(Token { order: 0, id, shortfall }.ordered(shortfall))
    };
    let mut tokens: Vec<Token> = (0..).zip(logits).filter_map(token).collect();
    if (1..tokens.len()).contains(&params.top_k) {
        tokens.select_nth_unstable_by_key(params.top_k, |token| token.order);
        tokens.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        keep_share(&mut tokens, params.top_p);
    }
    let farthest = params.farthest();
    tokens.retain(|token| token.shortfall <= farthest);
    if params.typical_p < 1.0 {
        let expected = expected_shortfall(&tokens);
        tokens.iter_mut().for_each(|token| *token = token.ordered(token.shortfall.abs_diff(expected)));
        keep_share(&mut tokens, params.typical_p);
    }
    tokens.iter_mut().for_each(|token| *token = token.ordered(token.shortfall));
    let place = (u128::from(params.random) * u128::from(mass(&tokens))) >> 64;
    reach(&mut tokens, place as u64 + 1);
    tokens.last().map_or(0, |token| token.id)
}

fn mass(tokens: &[Token]) -> u64 {
    tokens.iter().map(Token::weight).sum()
}

/// The mean over the weights, without as many of their last bits as the sum has no room for.
fn expected_shortfall(tokens: &[Token]) -> u32 {
    let mass = mass(tokens);
    let cut = mass.ilog2().saturating_sub(32);
    let sum: u64 = tokens.iter().map(|token| (token.weight() >> cut) * u64::from(token.shortfall)).sum();
    (sum / (mass >> cut)) as u32
}

fn keep_share(tokens: &mut Vec<Token>, share: f32) {
    let wanted = mass(tokens) as f64 * f64::from(share);
    reach(tokens, (wanted.ceil() as u64).max(1));
}

/// Keeps the first tokens in their order, up to and including the one with which they weigh `target`, which comes last.
fn reach(tokens: &mut Vec<Token>, target: u64) {
    let (mut from, mut to, mut before) = (0, tokens.len(), 0);
    while to - from > 1 {
        let middle = (from + to) / 2;
        tokens[from..to].select_nth_unstable_by_key(middle - from, |token| token.order);
        let half = mass(&tokens[from..middle]);
        if before + half >= target {
            to = middle;
        } else {
            (from, before) = (middle, before + half);
        }
    }
    tokens.truncate(to);
}

/// How many octaves, in [`FRACTION_BITS`] bits after the point, a token is below the likeliest; none where it is never
/// drawn.
fn shortfall(largest: f32, logit: f32, rate: f32) -> Option<u32> {
    let octaves = (largest - logit) * rate;
    let weighs = octaves >= 0.0 && octaves < OCTAVES as f32;
    weighs.then_some((octaves * (1 << FRACTION_BITS) as f32) as u32)
}

/// `2^(40 - shortfall)`. In plain products and sums, rounded one by one, as the GPU's kernel has them.
fn weight(shortfall: u32) -> u64 {
    let (whole, fraction) = (shortfall >> FRACTION_BITS, shortfall & ((1 << FRACTION_BITS) - 1));
    let x = fraction as f32 / (1 << FRACTION_BITS) as f32 - 0.5;
    let power = SERIES.iter().fold(0.0, |sum, coefficient| sum * x + coefficient);
    (u64::from((power * 16_777_216.0) as u32) << 16) >> whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two() {
        for i in 0..10_000_u32 {
            let shortfall = i * ((OCTAVES << FRACTION_BITS) / 10_000);
            let expected = (40.0 - f64::from(shortfall) / 2f64.powi(FRACTION_BITS as i32)).exp2();
            // A float's precision, and one for what the integer leaves out.
            let error = (weight(shortfall) as f64 - expected).abs();
            assert!(error <= 2.5e-7 * expected + 1.0, "{shortfall}: {} for {expected}", weight(shortfall));
        }
        assert_eq!(weight((OCTAVES << FRACTION_BITS) - 1), 1, "the least likely that is sampled at all");
    }
}
