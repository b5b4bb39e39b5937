use super::{SiluMul, check};
use crate::cuda::{Arg, Cuda, CudaOrder, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("silu_mul.cu");

impl SiluMul for Cuda {
    fn silu_mul(&self, x: &CudaTensor) -> Result<CudaTensor> {
        self.silu_mul_in_order(x, check(self.shape(x))?, None)
    }
}

impl Cuda {
    /// The same for gates and what they gate in runs of `run`, stored in the order that a weight wants.
    pub(crate) fn silu_mul_in_order(
        &self,
        x: &CudaTensor,
        run: usize,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        let n = check(self.shape(x))?;
        let y = self.new_tensor((self.shape(x).0, n))?;
        let args = [
            Arg::Address(self.real(&y)?),
            Arg::Address(self.real(x)?),
            Arg::Address(order.map_or(0, |order| order.features(self))),
            Arg::Int(n as i32),
            Arg::Int(run as i32),
        ];
        let shared = order.map_or(0, |_| n * self.dtype().size());
        self.launch("silu_mul", Launch::blocks(y.shape().0, 256).shared(shared), &args)?;
        Ok(y.said_to_be_in(order))
    }
}
