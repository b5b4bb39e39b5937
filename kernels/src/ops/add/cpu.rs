use candle_core::Tensor;

use super::{Add, check};
use crate::cpu::{View, axpy, each_row};
use crate::{Cpu, Device, Result};

impl Add for Cpu {
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        check(self.shape(a), self.shape(b))?;
        let (a, b) = (View::of(a)?, View::of(b)?);
        let mut y = a.to_vec();
        let width = a.columns;
        each_row(&mut y, width, |row, y| axpy(1.0, &b[row * width..][..width], y));
        self.tensor(y, (a.rows, a.columns))
    }
}
