use candle_core::Tensor;

use super::{Scale, check_cap};
use crate::cpu::{View, axpy, each_row, soft_cap};
use crate::ops::add;
use crate::{Cpu, Device, Result};

impl Scale for Cpu {
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        self.cap_scores(x, factor, None)
    }

    fn add_scaled(&self, a: &Tensor, b: &Tensor, factor: f32) -> Result<Tensor> {
        add::check(self.shape(a), self.shape(b))?;
        let (a, b) = (View::of(a)?, View::of(b)?);
        let mut y = a.to_vec();
        let width = a.columns;
        each_row(&mut y, width, |row, y| axpy(factor, &b[row * width..][..width], y));
        self.tensor(y, (a.rows, width))
    }

    fn cap_scores(&self, scores: &Tensor, factor: f32, cap: Option<f32>) -> Result<Tensor> {
        check_cap(cap)?;
        let x = View::of(scores)?;
        let mut y = x.to_vec();
        each_row(&mut y, x.columns, |_, row| {
            row.iter_mut().for_each(|x| *x *= factor);
            if let Some(cap) = cap {
                soft_cap(row, cap);
            }
        });
        self.tensor(y, (x.rows, x.columns))
    }
}
