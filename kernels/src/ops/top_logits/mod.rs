//! The few likeliest tokens of a vocabulary: what choosing one needs to know of its scores.

mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// The best of one row of scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Likeliest {
    /// Ids and logits, largest first; of equal ones the smaller id first.
    pub candidates: Vec<(u32, f32)>,
    /// `sum_i exp((logit[i] - largest) / temperature)` over the whole vocabulary.
    pub total: f32,
    /// The same at temperature 1.
    pub plain_total: f32,
}

/// The `count` largest logits of every row, and the mass that they are a part of.
/// logits: `[rows, vocab]` in f32, temperatures: one a row, above 0
pub trait TopLogits: Device {
    fn top_logits(&self, logits: &Self::Tensor, count: usize, temperatures: &[f32])
    -> Result<Vec<Likeliest>>;
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

/// At least one candidate and at most the vocabulary, and a temperature for each row.
pub(crate) fn check((rows, vocab): (usize, usize), count: usize, temperatures: &[f32]) -> Result<()> {
    if !(1..=MOST_CANDIDATES.min(vocab)).contains(&count) {
        return Err(Error::shape("top_logits", format!("1 to {}", MOST_CANDIDATES.min(vocab)), count));
    }
    let positive = |t: &f32| *t > 0.0 && t.is_finite();
    if temperatures.len() != rows || !temperatures.iter().all(positive) {
        return Err(Error::shape("top_logits temperatures", format!("{rows} above 0"), temperatures));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::{Cpu, HostTensor, MatMul};

    fn conforms(device: &(impl TopLogits + MatMul)) {
        for (risk, rows, vocab, count) in [
            ("one candidate", 1, 700, 1),
            ("several parts of a vocabulary", 3, 20_001, 64),
            ("all of a small one", 2, 5, 5),
        ] {
            // Coarse steps make ties, which go to the smaller id. They are exact in every type.
            let values: Vec<f32> = random(3, rows * vocab).iter().map(|x| (x * 64.0).round() / 8.0).collect();
            let logits = scores(device, &values, (rows, vocab));
            let temperatures: Vec<f32> = (0..rows).map(|row| 0.5 + row as f32).collect();
            let got = device.top_logits(&logits, count, &temperatures).unwrap();
            for ((row, got), temperature) in values.chunks(vocab).zip(&got).zip(&temperatures) {
                let mut expected: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
                expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let mass = |x: &(u32, f32)| ((x.1 - expected[0].1) as f64 / *temperature as f64).exp();
                let total: f64 = expected.iter().map(mass).sum();
                assert!((got.total as f64 / total - 1.0).abs() < 1e-4, "{risk}: {} for {total}", got.total);
                let total: f64 = expected.iter().map(|x| f64::from(x.1 - expected[0].1).exp()).sum();
                assert!((got.plain_total as f64 / total - 1.0).abs() < 1e-4, "{risk}: at temperature 1");
                assert_eq!(got.candidates, expected[..count], "{risk}");
            }
            assert!(device.top_logits(&logits, 0, &temperatures).is_err(), "{risk}: no candidate");
            assert!(device.top_logits(&logits, count, &[1.0; 9]).is_err(), "{risk}: other rows");
        }
    }

    /// A tensor as the head makes it: the product of the values and one.
    fn scores<D: MatMul>(device: &D, values: &[f32], (rows, vocab): (usize, usize)) -> D::Tensor {
        let mut columns = vec![0.0; values.len()];
        for (i, value) in values.iter().enumerate() {
            columns[i % vocab * rows + i / vocab] = *value;
        }
        let ones = (0..rows * rows).map(|i| (i / rows == i % rows) as u8 as f32).collect();
        let bytes: Vec<u8> = columns.iter().flat_map(|x| x.to_le_bytes()).collect();
        let weight = HostTensor::new(crate::Dtype::F32, vec![vocab, rows], &bytes).unwrap();
        let weight = device.weight(&[weight], &[]).unwrap();
        device.logits(&device.tensor(ones, (rows, rows)).unwrap(), &weight).unwrap()
    }

    #[test]
    fn the_best_come_first_on_the_cpu() {
        conforms(&Cpu::new());
    }

    #[test]
    fn the_best_come_first_on_cuda() {
        crate::testing::cards().iter().for_each(conforms);
    }
}
