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
        column[j] += if column[j] == 0.0 { 1.0 + damp } else { damp };
    });
    reversed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::{Device, Hessian};

    fn moments(tokens: usize, size: usize) -> Array2<f32> {
        let cpu = Cpu::new();
        let mut h = cpu.hessian(size).unwrap();
        cpu.accumulate(&mut h, &cpu.tensor(random(4, tokens * size), (tokens, size)).unwrap()).unwrap();
        h
    }

    /// `U (P H P^T + damp I) U^T` must be the identity.
    #[test]
    fn the_factor_undoes_the_permuted_hessian() {
        let size = 90;
        let h = moments(300, size);
        let order: Vec<u32> = (0..size as u32).map(|i| i * 37 % size as u32).collect();
        let damp = 3.0;
        let u = Cpu::new().inverse_cholesky(&h, &order, damp).unwrap();
        let a = |i: usize, j: usize| {
            let (x, y) = (order[i] as usize, order[j] as usize);
            h[[x.max(y), x.min(y)]] as f64 + if i == j { damp as f64 } else { 0.0 }
        };
        for i in 0..size {
            assert!((0..i).all(|j| u[[i, j]] == 0.0), "row {i} is not upper triangular");
            for j in 0..size {
                let terms = (i..size).flat_map(|p| (j..size).map(move |q| (p, q)));
                let got: f64 = terms.map(|(p, q)| u[[i, p]] as f64 * a(p, q) * u[[j, q]] as f64).sum();
                assert!((got - (i == j) as u8 as f64).abs() < 1e-5, "({i}, {j}) gives {got}");
            }
        }
    }

    #[test]
    fn a_singular_hessian_is_a_typed_error_and_damp_cures_it() {
        let h = moments(5, 20);
        let order: Vec<u32> = (0..20).collect();
        let indefinite = h.mapv(|x| -x);
        let failed = Cpu::new().inverse_cholesky(&indefinite, &order, 0.0);
        assert!(matches!(failed, Err(Error::NotPositiveDefinite { .. })));
        assert!(Cpu::new().inverse_cholesky(&h, &order, 1.0).is_ok());
    }

    #[test]
    fn a_dead_feature_and_a_nan_are_told_apart() {
        let mut h = moments(50, 8);
        for i in 0..8 {
            h[[3.max(i), 3.min(i)]] = 0.0;
        }
        let order: Vec<u32> = (0..8).collect();
        assert!(Cpu::new().inverse_cholesky(&h, &order, 0.0).is_ok());
        h[[5, 5]] = f32::NAN;
        assert!(Cpu::new().inverse_cholesky(&h, &order, 1.0).is_err());
    }

    #[test]
    fn an_order_that_repeats_a_feature_is_refused() {
        assert!(Cpu::new().inverse_cholesky(&moments(50, 3), &[0, 1, 1], 1.0).is_err());
    }
}
