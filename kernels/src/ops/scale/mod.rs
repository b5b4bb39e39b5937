//! Factors that some models put on embeddings, residual streams and scores, and the soft cap of scores.

mod cpu;
pub(crate) mod cuda;

use crate::{Add, Error, Result};

/// Element by element, in f32 and rounded once.
pub trait Scale: Add {
    /// `y = factor x`.  x: `[tokens, features]`
    fn scale(&self, x: &Self::Tensor, factor: f32) -> Result<Self::Tensor>;

    /// `y = a + factor b`.  a, b: `[tokens, features]`
    fn add_scaled(&self, a: &Self::Tensor, b: &Self::Tensor, factor: f32) -> Result<Self::Tensor>;

    /// `y = cap tanh(factor x / cap)`, without a cap `y = factor x`.
    /// scores: `[rows, vocab]` in f32, as [`crate::MatMul::logits`] makes them
    fn cap_scores(&self, scores: &Self::Tensor, factor: f32, cap: Option<f32>) -> Result<Self::Tensor>;
}

/// A cap must be a positive number.
pub(crate) fn check_cap(cap: Option<f32>) -> Result<()> {
    match cap {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(Error::shape("soft cap", "a positive number", cap))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};

    fn conforms(device: &impl Scale, tolerance: f64) {
        for (risk, rows, width) in
            [("eight at a time", 5, 64), ("a row that ends inside eight", 3, 37), ("many rows", 200, 72)]
        {
            let (a, b) = (random(1, rows * width), random(2, rows * width));
            let tensor = |x: &[f32]| device.tensor(x.to_vec(), (rows, width)).unwrap();
            let scaled: Vec<f64> = a.iter().map(|a| *a as f64 * 0.3f32 as f64).collect();
            let y = device.scale(&tensor(&a), 0.3).unwrap();
            assert_close(risk, &device.to_vec(&y).unwrap(), &scaled, tolerance);
            let sums: Vec<f64> =
                a.iter().zip(&b).map(|(a, b)| *a as f64 + 0.3f32 as f64 * *b as f64).collect();
            let y = device.add_scaled(&tensor(&a), &tensor(&b), 0.3).unwrap();
            assert_close(risk, &device.to_vec(&y).unwrap(), &sums, tolerance);
            let narrow = device.tensor(vec![0.0; rows], (rows, 1)).unwrap();
            assert!(
                device.add_scaled(&tensor(&a), &narrow, 0.3).is_err(),
                "{risk}: a column is not broadcast"
            );
        }
        for (risk, size) in [("scores far below the cap", 0.01), ("near it", 30.0), ("far beyond it", 5000.0)]
        {
            let scores: Vec<f32> = random(3, 4 * 1001).iter().map(|x| x * size).collect();
            let wide = device.wide_tensor(scores.clone(), (4, 1001)).unwrap();
            for (factor, cap) in [(1.0, Some(30.0)), (0.25, Some(50.0)), (0.25, None)] {
                let of = |x: &f32| match (f64::from(*x) * f64::from(factor), cap) {
                    (x, Some(cap)) => f64::from(cap) * (x / f64::from(cap)).tanh(),
                    (x, None) => x,
                };
                let expected: Vec<f64> = scores.iter().map(of).collect();
                let y = device.cap_scores(&wide, factor, cap).unwrap();
                // In f32 on every device.
                assert_close(&format!("{risk}, {cap:?}"), &device.to_vec(&y).unwrap(), &expected, NMSE_F32);
            }
            assert!(device.cap_scores(&wide, 1.0, Some(0.0)).is_err(), "{risk}: a cap of nothing");
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(|gpu| conforms(gpu, tolerance(gpu)));
    }
}
