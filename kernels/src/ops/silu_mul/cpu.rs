use candle_core::Tensor;
use rayon::prelude::*;

use super::{SiluMul, check};
use crate::cpu::{View, exp_in_place};
use crate::{Cpu, Device, Result};

impl SiluMul for Cpu {
    fn silu_mul(&self, x: &Tensor) -> Result<Tensor> {
        let n = check(self.shape(x))?;
        let x = View::of(x)?;
        let mut y = vec![0.0; x.rows * n];
        y.par_chunks_exact_mut(n).zip(x.par_chunks_exact(2 * n)).for_each(|(y, x)| {
            let (gate, up) = x.split_at(n);
            y.iter_mut().zip(gate).for_each(|(y, gate)| *y = -gate);
            exp_in_place(y, 0.0);
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = gate / (1.0 + *y) * up;
            }
        });
        self.tensor(y, (x.rows, n))
    }
}
