use candle_core::Tensor;
use rayon::prelude::*;

use super::{Add, check};
use crate::cpu::{View, axpy};
use crate::{Cpu, Device, Result};

impl Add for Cpu {
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        check(self.shape(a), self.shape(b))?;
        let (a, b) = (View::of(a)?, View::of(b)?);
        let mut y = a.to_vec();
        let width = a.columns.max(1);
        y.par_chunks_exact_mut(width).zip(b.par_chunks_exact(width)).for_each(|(y, b)| axpy(1.0, b, y));
        self.tensor(y, (a.rows, a.columns))
    }
}
