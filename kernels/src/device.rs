//! What every operation needs of a device: its tensors, and the way in and out of them.

use std::ops::Range;

use crate::{HostTensor, Result};

/// A place to compute. Operations are traits on top of this one, see [`crate::Backend`].
pub trait Device: Clone + Send + Sync + 'static {
    /// Activations, `[rows, features]`, immutable once made; a clone shares the data.
    type Tensor: Clone + Send + Sync;

    /// A name for people: the processor or the card, and how much of it is used.
    fn name(&self) -> String;

    /// Waits until everything asked for is done; a device that computes at once has nothing to wait for.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// An activation tensor of `shape` `(rows, features)` from row-major values.
    fn tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Self::Tensor>;

    /// The same in f32 even where activations are narrower: rotary frequencies.
    fn wide_tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Self::Tensor> {
        self.tensor(values, shape)
    }

    /// A host tensor (a vector counts as one row) as an activation tensor.
    fn tensor_from_host(&self, host: &HostTensor) -> Result<Self::Tensor> {
        self.tensor(host.to_f32(), host.dims2()?)
    }

    /// Row-major values of a tensor.
    fn to_vec(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// `(rows, features)`.
    fn shape(&self, x: &Self::Tensor) -> (usize, usize);

    /// The given rows of `x`.
    fn rows(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Self::Tensor>;

    /// The given rows of `x`, in the order of `indices`.
    fn gather_rows(&self, x: &Self::Tensor, indices: &[u32]) -> Result<Self::Tensor>;

    /// Tensors of equal rows, side by side.
    fn join_columns(&self, parts: &[Self::Tensor]) -> Result<Self::Tensor>;
}
