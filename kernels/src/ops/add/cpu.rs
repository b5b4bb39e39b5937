use candle_core::Tensor;

use super::{Add, check};
use crate::{Cpu, Device, Result};

impl Add for Cpu {
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        check(self.shape(a), self.shape(b))?;
        Ok((a + b)?)
    }
}
