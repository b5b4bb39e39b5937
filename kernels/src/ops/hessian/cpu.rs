use candle_core::Tensor;
use faer::{Accum, MatRef};
use ndarray::Array2;

use super::{Hessian, check, check_difference, check_products};
use crate::cpu::{Isa, View, add_gram, multiply};
use crate::{Cpu, Device, Result};

impl Hessian for Cpu {
    type Matrix = Array2<f32>;

    fn hessian(&self, size: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((size, size)))
    }

    fn accumulate(&self, hessian: &mut Array2<f32>, x: &Tensor) -> Result<()> {
        let size = hessian.nrows();
        check(self.shape(x), size)?;
        add_gram(values(hessian), &View::of(x)?, size, Isa::best());
        Ok(())
    }

    fn products(&self, rows: usize, columns: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((rows, columns)))
    }

    fn accumulate_products(&self, products: &mut Array2<f32>, a: &Tensor, x: &Tensor) -> Result<()> {
        let (rows, columns) = products.dim();
        check_products((rows, columns), [a, x].map(|tensor| self.shape(tensor)))?;
        let (a, x) = (View::of(a)?, View::of(x)?);
        let a = MatRef::from_row_major_slice(&a, x.rows, rows);
        let x = MatRef::from_row_major_slice(&x, x.rows, columns);
        multiply(values(products), columns, Accum::Add, a.transpose(), x);
        Ok(())
    }

    fn difference(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        check_difference(self.shape(a), self.shape(b))?;
        let (a, b) = (View::of(a)?, View::of(b)?);
        self.tensor(a.iter().zip(b.iter()).map(|(a, b)| a - b).collect(), (a.rows, a.columns))
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
