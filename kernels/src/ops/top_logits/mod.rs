//! The few likeliest tokens of a vocabulary, for requests that ask for alternatives.

mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// The best of one row of scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Likeliest {
    /// Ids and logits, largest first; of equal ones the smaller id first.
    pub candidates: Vec<(u32, f32)>,
    /// `sum_i exp(logit[i] - largest)` over the whole vocabulary.
    pub total: f32,
}

/// The `count` largest logits of every row, and the mass that they are a part of.
/// logits: `[rows, vocab]` in f32
pub trait TopLogits: Device {
    fn top_logits(&self, logits: &Self::Tensor, count: usize) -> Result<Vec<Likeliest>>;
}

/// The `count` largest logits and their ids, largest first; of equal ones the smaller id first.
pub fn largest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if (1..all.len()).contains(&count) {
        all.select_nth_unstable_by(count - 1, descending);
    }
    all.truncate(count);
    all.sort_unstable_by(descending);
    all
}

/// Most candidates that can be asked for.
pub const MOST_CANDIDATES: usize = 64;

/// At least one candidate and at most the vocabulary.
pub(crate) fn check(vocab: usize, count: usize) -> Result<()> {
    let most = MOST_CANDIDATES.min(vocab);
    match (1..=most).contains(&count) {
        true => Ok(()),
        false => Err(Error::shape("top_logits", format!("1 to {most}"), count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::random;

    fn conforms(device: &impl TopLogits) {
        for (risk, rows, vocab, count) in [
            ("one candidate", 1, 700, 1),
            ("several parts of a vocabulary", 3, 20_001, 64),
            ("all of a small one", 2, 5, 5),
        ] {
            // Coarse steps make ties, which go to the smaller id.
            let values: Vec<f32> = random(3, rows * vocab).iter().map(|x| (x * 64.0).round() / 8.0).collect();
            let logits = device.wide_tensor(values.clone(), (rows, vocab)).unwrap();
            let got = device.top_logits(&logits, count).unwrap();
            assert_eq!(got.len(), rows);
            for (row, got) in values.chunks(vocab).zip(&got) {
                let mut expected: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
                expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let total: f64 = expected.iter().map(|x| f64::from(x.1 - expected[0].1).exp()).sum();
                assert!((got.total as f64 / total - 1.0).abs() < 1e-4, "{risk}: {} for {total}", got.total);
                assert_eq!(got.candidates, expected[..count], "{risk}");
            }
            assert!(device.top_logits(&logits, 0).is_err(), "{risk}: no candidate");
        }
    }

    #[test]
    fn the_best_come_first_on_the_cpu() {
        conforms(&Cpu::new());
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn the_best_come_first_on_cuda() {
        crate::testing::gpus().iter().for_each(conforms);
    }
}
