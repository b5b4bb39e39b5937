use candle_core::Tensor;

use super::{SiluMul, check};
use crate::cpu::{View, each_row, exp_in_place};
use crate::{Cpu, Device, Result};

impl SiluMul for Cpu {
    fn silu_mul(&self, x: &Tensor) -> Result<Tensor> {
        let n = check(self.shape(x))?;
        let x = View::of(x)?;
        let mut y = vec![0.0; x.rows * n];
        each_row(&mut y, n, |row, y| {
            let (gate, up) = x[2 * row * n..][..2 * n].split_at(n);
            y.iter_mut().zip(gate).for_each(|(y, gate)| *y = -gate);
            exp_in_place(y, 0.0);
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = gate / (1.0 + *y) * up;
            }
        });
        self.tensor(y, (x.rows, n))
    }
}
