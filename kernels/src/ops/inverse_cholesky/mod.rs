//! The factor that GPTQ sweeps with (Frantar et al. 2022, section 3.3, step 3).

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::{Error, Hessian, Result};

/// The upper triangular `U` with `U^T U = (P H P^T + damp I)^-1`, where P puts feature `order[i]` at place i.
///
/// Both triangles of H follow from its lower one. Instead of inverting and factoring, the index-reversed
/// matrix is factored once and its triangle inverted: with `P H P^T = R R^T`, R upper, `U = R^-1`.
pub trait InverseCholesky: Hessian {
    /// Adds `damp` to the diagonal, and 1 more where it is zero: a dead feature, whose weights are zero.
    /// Fails with [`Error::NotPositiveDefinite`] where no finite factor exists; H is left as it was.
    fn inverse_cholesky(&self, hessian: &Self::Matrix, order: &[u32], damp: f32) -> Result<Self::Matrix>;

    /// `P H P^T + damp I` itself, both triangles; dead features as above.
    fn damped(&self, hessian: &Self::Matrix, order: &[u32], damp: f32) -> Result<Self::Matrix>;
}

/// `order` must name every feature once.
pub(crate) fn check(size: usize, order: &[u32]) -> Result<()> {
    let mut seen = vec![false; size];
    let mut fresh = |i: &u32| seen.get_mut(*i as usize).is_some_and(|s| !std::mem::replace(s, true));
    if order.len() != size || !order.iter().all(&mut fresh) {
        return Err(Error::shape("inverse_cholesky order", format!("a permutation of {size}"), order.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{gpus, random};

    /// Second moments of random tokens, with the given features' values replaced.
    fn moments<D: Hessian>(device: &D, tokens: usize, size: usize, replace: &[(usize, f32)]) -> D::Matrix {
        let mut x = random(4, tokens * size);
        for row in x.chunks_exact_mut(size) {
            replace.iter().for_each(|(feature, value)| row[*feature] = *value);
        }
        let mut h = device.hessian(size).unwrap();
        device.accumulate(&mut h, &device.tensor(x, (tokens, size)).unwrap()).unwrap();
        h
    }

    /// `U (P H P^T + damp I) U^T` must be the identity.
    fn undoes_the_permuted_hessian(device: &impl InverseCholesky) {
        for size in [64, 90, 211] {
            let h = moments(device, 600, size, &[]);
            let order: Vec<u32> = (0..size as u32).map(|i| i * 37 % size as u32).collect();
            let damp = 3.0;
            let u = device.inverse_cholesky(&h, &order, damp).unwrap();
            let damped = device.damped(&h, &order, damp).unwrap();
            let damped = device.matrix_to_vec(&damped).unwrap();
            let (h, u) = (device.matrix_to_vec(&h).unwrap(), device.matrix_to_vec(&u).unwrap());
            let a = |i: usize, j: usize| {
                let (x, y) = (order[i] as usize, order[j] as usize);
                h[x.max(y) * size + x.min(y)] as f64 + if i == j { damp as f64 } else { 0.0 }
            };
            for i in 0..size {
                assert!((0..size).all(|j| damped[i * size + j] == a(i, j) as f32), "row {i} of the matrix");
                assert!((0..i).all(|j| u[i * size + j] == 0.0), "row {i} is not upper triangular");
                let row: Vec<f64> =
                    (0..size).map(|q| (i..size).map(|p| u[i * size + p] as f64 * a(p, q)).sum()).collect();
                for j in 0..size {
                    let got: f64 = (j..size).map(|q| row[q] * u[j * size + q] as f64).sum();
                    assert!((got - (i == j) as u8 as f64).abs() < 1e-5, "{size}: ({i}, {j}) gives {got}");
                }
            }
        }
    }

    fn tells_failures_apart(device: &impl InverseCholesky) {
        let order: Vec<u32> = (0..20).collect();
        let singular = moments(device, 5, 20, &[]);
        let failed = device.inverse_cholesky(&singular, &order, -1.0);
        assert!(matches!(failed, Err(Error::NotPositiveDefinite { .. })));
        assert!(device.inverse_cholesky(&singular, &order, 1.0).is_ok());
        let dead = moments(device, 50, 20, &[(3, 0.0)]);
        assert!(device.inverse_cholesky(&dead, &order, 0.0).is_ok());
        let nan = moments(device, 50, 20, &[(5, f32::NAN)]);
        assert!(device.inverse_cholesky(&nan, &order, 1.0).is_err());
        assert!(device.inverse_cholesky(&dead, &[0, 1, 1], 1.0).is_err(), "a feature twice");
    }

    #[test]
    fn the_factor_undoes_the_permuted_hessian() {
        undoes_the_permuted_hessian(&Cpu::new());
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn the_factor_undoes_the_permuted_hessian_on_cuda() {
        gpus().iter().for_each(undoes_the_permuted_hessian);
    }

    #[test]
    fn singular_dead_and_damaged_hessians_are_told_apart() {
        tells_failures_apart(&Cpu::new());
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn singular_dead_and_damaged_hessians_are_told_apart_on_cuda() {
        gpus().iter().for_each(tells_failures_apart);
    }
}
