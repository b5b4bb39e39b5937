//! Root-mean-square normalisation (Zhang and Sennrich 2019).

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::error::expect;
use crate::{Device, Result};

/// What a norm multiplies with, and what keeps it from dividing by zero.
pub struct Norm<'a, T> {
    /// `[1, hidden]`
    pub weight: &'a T,
    pub eps: f32,
}

// Derived, they would ask the same of the tensor.
impl<T> Clone for Norm<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Norm<'_, T> {}

/// `y[t, i] = x[t, i] * weight[i] / sqrt(mean_j x[t, j]^2 + eps)`, accumulated in f32.
/// x: `[tokens, hidden]`, weight: `[1, hidden]`
pub trait RmsNorm: Device {
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Result<Self::Tensor>;
}

/// The weight must be one row as wide as `x`.
pub(crate) fn check(x: (usize, usize), weight: (usize, usize)) -> Result<()> {
    expect("rms_norm weight", (1, x.1), weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};

    fn reference(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
        let row = |x: &[f32]| {
            let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / x.len() as f64;
            let factor = 1.0 / (mean + eps).sqrt();
            x.iter().zip(weight).map(|(x, w)| *x as f64 * *w as f64 * factor).collect::<Vec<_>>()
        };
        x.chunks(weight.len()).flat_map(row).collect()
    }

    fn conforms(device: &impl RmsNorm, tolerance: f64) {
        for (risk, tokens, hidden, eps) in
            [("one row", 1, 64, 1e-6), ("odd width", 3, 37, 1e-5), ("many rows", 130, 384, 1e-6)]
        {
            let (x, weight) = (random(1, tokens * hidden), random(2, hidden));
            let expected = reference(&x, &weight, eps);
            let x = device.tensor(x, (tokens, hidden)).unwrap();
            let weight = device.tensor(weight, (1, hidden)).unwrap();
            let y = device.to_vec(&device.rms_norm(&x, &weight, eps as f32).unwrap()).unwrap();
            assert_close(risk, &y, &expected, tolerance);
            let wide = device.tensor(vec![1.0; hidden + 1], (1, hidden + 1)).unwrap();
            assert!(device.rms_norm(&x, &wide, 1e-6).is_err(), "{risk}: a weight of the wrong width");
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
