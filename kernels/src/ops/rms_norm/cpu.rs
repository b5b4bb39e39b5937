use candle_core::Tensor;

use super::{RmsNorm, check};
use crate::cpu::{View, dot, new_rows};
use crate::{Cpu, Device, Result};

impl RmsNorm for Cpu {
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        check(self.shape(x), self.shape(weight))?;
        let (x, weight) = (View::of(x)?, View::of(weight)?);
        let y = new_rows(x.rows, x.columns, |row, y| {
            y.copy_from_slice(&x[row * x.columns..][..x.columns]);
            normalise(y, &weight, eps);
        });
        self.tensor(y, (x.rows, x.columns))
    }
}

/// `row[i] *= weight[i] / rms(row)`, in place.
pub(crate) fn normalise(row: &mut [f32], weight: &[f32], eps: f32) {
    let mean_square = dot(row, row) / row.len() as f32;
    let factor = 1.0 / (mean_square + eps).sqrt();
    for (x, w) in row.iter_mut().zip(weight) {
        *x *= factor * w;
    }
}
