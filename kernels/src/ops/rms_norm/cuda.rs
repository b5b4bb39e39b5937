use super::{Norm, RmsNorm, check};
use crate::cuda::{Args, Cuda, CudaOrder, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("rms_norm.cu");

/// Threads of a block: rows of 4096 features have eight for each.
const THREADS: u32 = 512;

impl RmsNorm for Cuda {
    fn rms_norm(&self, x: &CudaTensor, weight: &CudaTensor, eps: f32) -> Result<CudaTensor> {
        self.rms_norm_in_order(x, Norm { weight, eps }, None)
    }
}

impl Cuda {
    /// The same, stored in the order that a weight wants.
    pub(crate) fn rms_norm_in_order(
        &self,
        x: &CudaTensor,
        norm: Norm<CudaTensor>,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        let shape = self.shape(x);
        check(shape, self.shape(norm.weight))?;
        let (y, layout) = self.new_tensor_in(shape, order)?;
        let args = Args::new([self.values(&y)?, self.real(x)?, self.real(norm.weight)?, layout.features])
            .ints([shape.1])
            .floats([norm.eps])
            .ints([layout.panel_tokens]);
        let shared = if layout.features == 0 { 0 } else { shape.1 * self.dtype().size() };
        let launch = Launch::blocks(shape.0, THREADS).shared(shared);
        self.launch("rms_norm", launch.early().mostly_shared(), &args)?;
        Ok(y)
    }
}
