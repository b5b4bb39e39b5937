//! The gated activation of the feed-forward stage (Shazeer 2020, SwiGLU).

mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// `y[t, i] = silu(x[t, i]) * x[t, i + n]` with `silu(a) = a / (1 + exp(-a))`.
/// x: `[tokens, 2 n]`, gate in the first half, up in the second; result: `[tokens, n]`
pub trait SiluMul: Device {
    fn silu_mul(&self, x: &Self::Tensor) -> Result<Self::Tensor>;
}

/// `x` must fall into two halves.
pub(crate) fn check(x: (usize, usize)) -> Result<usize> {
    if !x.1.is_multiple_of(2) {
        return Err(Error::shape("silu_mul", "an even number of features", x.1));
    }
    Ok(x.1 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};

    fn conforms(device: &impl SiluMul, tolerance: f64) {
        for (risk, scale) in [("ordinary values", 3.0), ("the exponential overflows", 200.0)] {
            let x: Vec<f32> = random(3, 5 * 66).iter().map(|x| x * scale).collect();
            let expected: Vec<f64> = x
                .chunks(66)
                .flat_map(|row| (0..33).map(|i| (row[i] as f64, row[i + 33] as f64)).collect::<Vec<_>>())
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            let x = device.tensor(x, (5, 66)).unwrap();
            assert_close(risk, &device.to_vec(&device.silu_mul(&x).unwrap()).unwrap(), &expected, tolerance);
        }
        let odd = device.tensor(vec![0.0; 3], (1, 3)).unwrap();
        assert!(device.silu_mul(&odd).is_err(), "an odd width has no halves");
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::cards().iter().for_each(|card| conforms(card, tolerance(card)));
    }
}
