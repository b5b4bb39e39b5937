//! The model's own probabilities of tokens, before any sampling parameter.

use gptq_kernels::Likeliest;

/// An id and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenProbability {
    pub id: u32,
    pub logprob: f32,
}

/// The likeliest tokens with their probabilities among all.
pub fn top_probabilities(likeliest: &Likeliest) -> Vec<TokenProbability> {
    let largest = likeliest.candidates.first().map_or(0.0, |best| best.1);
    let total = likeliest.total.ln();
    let of = |(id, logit): &(u32, f32)| TokenProbability { id: *id, logprob: logit - largest - total };
    likeliest.candidates.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use gptq_kernels::{Cpu, Device, TopLogits};

    use super::*;

    #[test]
    fn log_probabilities_are_normalised_and_sorted() {
        let cpu = Cpu::new();
        let logits = cpu.tensor(vec![1f32.ln(), 2f32.ln(), 7f32.ln()], (1, 3)).unwrap();
        let top = top_probabilities(&cpu.top_logits(&logits, 2).unwrap()[0]);
        assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 1]);
        assert!((top[1].logprob - 0.2f32.ln()).abs() < 1e-6);
    }
}
