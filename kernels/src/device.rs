//! What every operation needs of a device: its tensors, and the way in and out of them.

use std::ops::Range;

use crate::{Batch, Error, HostTensor, Result};

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub used: usize,
    /// The most that was in use at once so far.
    pub peak: usize,
    /// What this program may use in all.
    pub available: usize,
}

/// A place to compute. Operations are traits on top of this one, see [`crate::Backend`].
pub trait Device: Clone + Send + Sync + 'static {
    /// Activations, `[rows, features]`, immutable once made; a clone shares the data.
    type Tensor: Clone + Send + Sync;

    /// An order of features in which a weight wants its input. Operations that write such an input can store it so.
    type Order: Clone + Send + Sync;

    /// A step that can be run again as a whole.
    type Graph: Send;

    /// A tensor out of the way, in host memory; a clone shares it.
    type Offloaded: Clone + Send + Sync;

    /// When the device was through with what it had been asked for up to some point.
    type Mark: Send;

    /// A name for people: the processor or the GPU, and how much of it is used.
    fn name(&self) -> String;

    /// What decides how results are rounded: the kind of device and the type in which it computes. Devices that differ in
    /// it need not agree bit for bit.
    fn arithmetic(&self) -> String;

    /// Devices that hold parts of every weight, see [`Self::all_reduce`].
    fn devices(&self) -> usize {
        1
    }

    /// The sum of what all devices have: of a product whose inputs are divided over them each has a part. One device has
    /// all of it.
    fn all_reduce(&self, partial: Self::Tensor) -> Result<Self::Tensor> {
        Ok(partial)
    }

    /// Waits until everything asked for is done; a device that computes at once has nothing to wait for.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// A point behind everything asked for so far, to time the device's work without waiting for it.
    fn mark(&self) -> Result<Self::Mark>;

    /// Seconds from one point to a later one, once the device has reached it.
    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;

    /// Kernels that were asked for so far; `None` where computing is no asking.
    fn launches(&self) -> Option<u64> {
        None
    }

    /// Whether the host may ask for more before it has seen the results of what it asked for.
    fn works_aside(&self) -> bool {
        false
    }

    /// Bytes of one element of an activation.
    fn element_size(&self) -> usize;

    /// What the device's memory holds; `None` where it is the host's.
    fn memory(&self) -> Result<Option<Memory>> {
        Ok(None)
    }

    /// Takes a tensor out of the device's memory, which is free once the copy is done and `x` is dropped.
    fn offload(&self, x: &Self::Tensor) -> Result<Self::Offloaded>;

    /// Brings an offloaded tensor back. The copy runs beside what is computed meanwhile; the first use of the tensor
    /// waits for it.
    fn fetch(&self, offloaded: &Self::Offloaded) -> Result<Self::Tensor>;

    /// The same values in memory of their own.
    fn copy(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// Runs a step over `batch` and captures it as a graph, for a device where launching every operation anew costs more
    /// than running it. `None` where there is nothing to gain, or where the step cannot be captured; it may have run.
    fn capture<E: From<Error>>(
        &self,
        batch: &Batch,
        step: &mut dyn FnMut() -> Result<Self::Tensor, E>,
    ) -> Result<Option<Self::Graph>, E>;

    /// Runs a captured step over another batch; `None` where that has not the shape of the captured one. The result
    /// is valid until the next replay.
    fn replay(&self, graph: &Self::Graph, batch: &Batch) -> Result<Option<Self::Tensor>>;

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
