use super::{Norm, RmsNorm, check};
use crate::cuda::{Arg, Cuda, CudaOrder, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("rms_norm.cu");

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
        let y = self.new_tensor(shape)?;
        let args = [
            Arg::Address(self.real(&y)?),
            Arg::Address(self.real(x)?),
            Arg::Address(self.real(norm.weight)?),
            Arg::Address(order.map_or(0, |order| order.features(self))),
            Arg::Int(shape.1 as i32),
            Arg::Float(norm.eps),
        ];
        let shared = order.map_or(0, |_| shape.1 * self.dtype().size());
        self.launch("rms_norm", Launch::blocks(shape.0, 256).shared(shared).early(), &args)?;
        Ok(y.said_to_be_in(order))
    }
}
