//! The gated activation of the feed-forward stage (Shazeer 2020).

mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// What is done with a gate before it multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `a / (1 + exp(-a))`
    #[default]
    Silu,
    /// `a / 2 (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3)))` (Hendrycks and Gimpel 2016, the approximation)
    GeluTanh,
    /// `a / 2 (1 + erf(a / sqrt(2)))`
    Gelu,
}

/// `y[t, i] = activation(x[t, i]) * x[t, i + n]`
/// x: `[tokens, 2 n]`, gate in the first half, up in the second; result: `[tokens, n]`
pub trait Gated: Device {
    fn gated(&self, x: &Self::Tensor, activation: Activation) -> Result<Self::Tensor>;
}

/// The tanh form is `a / (1 + exp(-(LINEAR a + CUBIC a^3)))`, since `(1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))`:
/// `2 sqrt(2 / pi)`, and that times 0.044715.
pub(crate) const LINEAR: f32 = 1.595_769_2;
pub(crate) const CUBIC: f32 = 0.071_354_814;

/// `x` must fall into two halves.
pub(crate) fn check(x: (usize, usize)) -> Result<usize> {
    if !x.1.is_multiple_of(2) {
        return Err(Error::shape("gated activation", "an even number of features", x.1));
    }
    Ok(x.1 / 2)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};

    pub(crate) const ALL: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

    /// Taylor's series, which has nine digits left where it stops being used; beyond that erf is 1 in as many.
    fn erf(x: f64) -> f64 {
        if x.abs() > 4.5 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    pub(crate) fn activated(gate: f64, activation: Activation) -> f64 {
        match activation {
            Activation::Silu => gate / (1.0 + (-gate).exp()),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                0.5 * gate * (1.0 + inner.tanh())
            }
            Activation::Gelu => 0.5 * gate * (1.0 + erf(gate / std::f64::consts::SQRT_2)),
        }
    }

    fn conforms(device: &impl Gated, tolerance: f64) {
        for activation in ALL {
            for (risk, scale, n) in [
                ("ordinary values", 3.0, 33),
                ("small values", 0.01, 40),
                ("the exponential overflows", 200.0, 33),
            ] {
                let x: Vec<f32> = random(3, 5 * 2 * n).iter().map(|x| x * scale).collect();
                let expected: Vec<f64> = x
                    .chunks(2 * n)
                    .flat_map(|row| (0..n).map(|i| (row[i] as f64, row[i + n] as f64)).collect::<Vec<_>>())
                    .map(|(gate, up)| activated(gate, activation) * up)
                    .collect();
                let x = device.tensor(x, (5, 2 * n)).unwrap();
                let y = device.gated(&x, activation).unwrap();
                let risk = format!("{activation:?}, {risk}");
                assert_close(&risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
            }
        }
        let odd = device.tensor(vec![0.0; 3], (1, 3)).unwrap();
        assert!(device.gated(&odd, Activation::Silu).is_err(), "an odd width has no halves");
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
