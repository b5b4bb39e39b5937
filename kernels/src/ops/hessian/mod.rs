//! The second moments of a stage's input: the Hessian of GPTQ's layer-wise problem
//! (Frantar et al. 2022, section 3.1).

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::{Device, Error, Result};

/// `H += sum_t x[t] x[t]^T`.  x: `[tokens, in]`, H: `[in, in]`
///
/// The paper's factor 2 / samples is left to the caller: it scales the reported loss and no code.
pub trait Hessian: Device {
    /// A square f32 matrix of the solver. Of a Hessian only the lower triangle is meaningful.
    type Matrix: Send + Sync;

    /// A Hessian of `size` features that has seen no token.
    fn hessian(&self, size: usize) -> Result<Self::Matrix>;

    fn accumulate(&self, hessian: &mut Self::Matrix, x: &Self::Tensor) -> Result<()>;

    /// The whole matrix, `[in, in]` row-major.
    fn matrix_to_vec(&self, matrix: &Self::Matrix) -> Result<Vec<f32>>;

    /// `H[i, i]` for every feature.
    fn diagonal(&self, hessian: &Self::Matrix) -> Result<Vec<f32>>;
}

/// `x` must be as wide as the Hessian.
pub(crate) fn check(x: (usize, usize), size: usize) -> Result<()> {
    if x.1 != size {
        return Err(Error::shape("hessian", (x.0, size), x));
    }
    Ok(())
}
