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
