use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{MatMut, MatRef};
use ndarray::Array2;
use rayon::prelude::*;

use super::{InverseCholesky, check};
use crate::cpu::all_cores;
use crate::ops::hessian::cpu::values;
use crate::{Cpu, Error, Result};

impl InverseCholesky for Cpu {
    fn inverse_cholesky(&self, hessian: &Array2<f32>, order: &[u32], damp: f32) -> Result<Array2<f32>> {
        let size = hessian.nrows();
        check(size, order)?;
        let mut reversed = reversed_lower(hessian, order, damp);
        let mut factor = MatMut::from_column_major_slice_mut(&mut reversed, size, size);
        let mut memory =
            MemBuffer::new(cholesky_in_place_scratch::<f32>(size, all_cores(), Default::default()));
        let stack = MemStack::new(&mut memory);
        cholesky_in_place(factor.as_mut(), Default::default(), all_cores(), stack, Default::default())
            .map_err(|LltError::NonPositivePivot { index }| Error::NotPositiveDefinite {
                pivot: index,
                size,
            })?;
        let mut inverse = Array2::zeros((size, size));
        let target = MatMut::from_row_major_slice_mut(values(&mut inverse), size, size);
        invert_lower_triangular(target, MatRef::from_column_major_slice(&reversed, size, size), all_cores());
        // Turning a matrix by half a circle reverses its memory, and makes the lower inverse U.
        values(&mut inverse).reverse();
        match inverse.iter().position(|x| !x.is_finite()) {
            Some(place) => Err(Error::NotPositiveDefinite { pivot: place / size, size }),
            None => Ok(inverse),
        }
    }

    fn damped(&self, hessian: &Array2<f32>, order: &[u32], damp: f32) -> Result<Array2<f32>> {
        check(hessian.nrows(), order)?;
        let mut damped = ordered(hessian, order);
        damped.diag_mut().mapv_inplace(|diagonal| damped_pivot(diagonal, damp));
        Ok(damped)
    }
}

/// The permuted Hessian, both triangles.
pub(crate) fn ordered(hessian: &Array2<f32>, order: &[u32]) -> Array2<f32> {
    let size = order.len();
    let mut ordered = Array2::zeros((size, size));
    values(&mut ordered).par_chunks_exact_mut(size.max(1)).zip(order).for_each(|(row, a)| {
        for (out, b) in row.iter_mut().zip(order) {
            *out = hessian[[*a.max(b) as usize, *a.min(b) as usize]];
        }
    });
    ordered
}

/// A feature's damped diagonal element.
fn damped_pivot(diagonal: f32, damp: f32) -> f32 {
    diagonal + if diagonal == 0.0 { 1.0 + damp } else { damp }
}

/// The lower triangle, column by column, of the permuted and damped Hessian with both axes reversed.
fn reversed_lower(hessian: &Array2<f32>, order: &[u32], damp: f32) -> Vec<f32> {
    let size = order.len();
    let mut reversed = vec![0.0; size * size];
    reversed.par_chunks_exact_mut(size.max(1)).enumerate().for_each(|(j, column)| {
        let b = order[size - 1 - j] as usize;
        for (i, out) in column.iter_mut().enumerate().skip(j) {
            let a = order[size - 1 - i] as usize;
            *out = hessian[[a.max(b), a.min(b)]];
        }
        column[j] = damped_pivot(column[j], damp);
    });
    reversed
}
