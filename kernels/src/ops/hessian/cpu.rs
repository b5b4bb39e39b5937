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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, random};

    #[test]
    fn tiles_of_tokens_add_up_to_the_whole() {
        let (tokens, size) = (150, 70);
        let x = random(1, tokens * size);
        let cpu = Cpu::new();
        let mut h = cpu.hessian(size).unwrap();
        for tile in [0..64, 64..65, 65..150] {
            let part = x[tile.start * size..tile.end * size].to_vec();
            cpu.accumulate(&mut h, &cpu.tensor(part, (tile.len(), size)).unwrap()).unwrap();
        }
        let pairs: Vec<_> = (0..size).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
        let moment = |&(i, j): &(usize, usize)| {
            (0..tokens).map(|t| x[t * size + i] as f64 * x[t * size + j] as f64).sum()
        };
        let got: Vec<f32> = pairs.iter().map(|&(i, j)| h[[i, j]]).collect();
        assert_close("lower triangle", &got, &pairs.iter().map(moment).collect::<Vec<f64>>(), NMSE_F32);
        assert!(
            cpu.accumulate(&mut h, &cpu.tensor(vec![0.0; 69], (1, 69)).unwrap()).is_err(),
            "another width"
        );
    }
}
