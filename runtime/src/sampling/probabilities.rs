//! The model's own probabilities of tokens, before any sampling parameter.

use gptq_kernels::Likeliest;

/// An id and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenProbability {
    pub id: u32,
    pub logprob: f32,
}

/// The log-probability of `id` and the `top` likeliest ids.  logits: `[vocab]`
pub fn log_probabilities(logits: &[f32], id: u32, top: usize) -> (f32, Vec<TokenProbability>) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    let normal = largest + sum.ln() as f32;
    let likeliest = if top > 0 { gptq_kernels::largest(logits, top) } else { Vec::new() };
    let of = |id: u32, logit: f32| TokenProbability { id, logprob: logit - normal };
    let own = logits.get(id as usize).map_or(f32::NEG_INFINITY, |logit| logit - normal);
    (own, likeliest.into_iter().map(|(id, logit)| of(id, logit)).collect())
}

/// The same from the likeliest tokens; `None` where those do not tell.
pub fn likeliest_probabilities(
    likeliest: &Likeliest,
    id: u32,
    top: usize,
) -> Option<(f32, Vec<TokenProbability>)> {
    let all = top_probabilities(likeliest);
    let own = all.iter().find(|candidate| candidate.id == id)?.logprob;
    Some((own, all.get(..top)?.to_vec()))
}

/// The likeliest tokens with their probabilities among all.
pub fn top_probabilities(likeliest: &Likeliest) -> Vec<TokenProbability> {
    let largest = likeliest.candidates.first().map_or(0.0, |best| best.1);
    let normal = largest + likeliest.plain_total.ln();
    let of = |(id, logit): &(u32, f32)| TokenProbability { id: *id, logprob: logit - normal };
    likeliest.candidates.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_normalised_and_sorted() {
        let (own, top) = log_probabilities(&[1f32.ln(), 2f32.ln(), 7f32.ln()], 1, 2);
        assert!((own - 0.2f32.ln()).abs() < 1e-6);
        assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 1]);
    }
}
