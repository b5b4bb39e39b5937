use candle_core::Tensor;
use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::{Accum, MatMut, MatRef};
use ndarray::Array2;

use super::{Hessian, check};
use crate::cpu::{View, all_cores};
use crate::{Cpu, Device, Result};

impl Hessian for Cpu {
    type Matrix = Array2<f32>;

    fn hessian(&self, size: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((size, size)))
    }

    fn accumulate(&self, hessian: &mut Array2<f32>, x: &Tensor) -> Result<()> {
        let size = hessian.nrows();
        check(self.shape(x), size)?;
        let x = View::of(x)?;
        let x = MatRef::from_row_major_slice(&x, x.rows, x.columns);
        let whole = BlockStructure::Rectangular;
        let h = MatMut::from_row_major_slice_mut(values(hessian), size, size);
        matmul(
            h,
            BlockStructure::TriangularLower,
            Accum::Add,
            x.transpose(),
            whole,
            x,
            whole,
            1.0,
            all_cores(),
        );
        Ok(())
    }

    fn matrix_to_vec(&self, matrix: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(matrix.iter().copied().collect())
    }

    fn diagonal(&self, hessian: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(hessian.diag().to_vec())
    }
}

/// The row-major values of a matrix that this crate made, which is always in standard layout.
pub(crate) fn values(matrix: &mut Array2<f32>) -> &mut [f32] {
    matrix.as_slice_mut().unwrap_or_default()
}
