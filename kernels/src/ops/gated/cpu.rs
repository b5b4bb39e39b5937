use candle_core::Tensor;
use candle_core::cpu::erf::erf_f64;

use super::{Activation, CUBIC, Gated, LINEAR, check};
use crate::cpu::{View, exp_in_place, new_rows};
use crate::{Cpu, Device, Result};

impl Gated for Cpu {
    fn gated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let n = check(self.shape(x))?;
        let x = View::of(x)?;
        let y = new_rows(x.rows, n, |row, y| {
            let (gate, up) = x[2 * row * n..][..2 * n].split_at(n);
            activate(gate, y, activation);
            y.iter_mut().zip(up).for_each(|(y, up)| *y *= up);
        });
        self.tensor(y, (x.rows, n))
    }
}

fn activate(gate: &[f32], y: &mut [f32], activation: Activation) {
    let pairs = y.iter_mut().zip(gate);
    match activation {
        Activation::Silu => pairs.for_each(|(y, a)| *y = -a),
        Activation::GeluTanh => pairs.for_each(|(y, a)| *y = -a * (LINEAR + CUBIC * a * a)),
        Activation::Gelu => {
            // In f64, since 1 + erf is a small difference where the gate is negative.
            let half = |a: f64| 0.5 * a * (1.0 + erf_f64(a * std::f64::consts::FRAC_1_SQRT_2));
            return pairs.for_each(|(y, a)| *y = half(f64::from(*a)) as f32);
        }
    }
    exp_in_place(y, 0.0);
    y.iter_mut().zip(gate).for_each(|(y, a)| *y = a / (1.0 + *y));
}
