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
    /// The same for gates and what they gate in runs of `run`, which are in `order` already.
    pub(crate) fn silu_mul_in_order(
        &self,
        x: &CudaTensor,
        run: usize,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        let n = check(self.shape(x))?;
        let (y, layout) = self.new_tensor_in((self.shape(x).0, n), order)?;
        let args = [
            Arg::Address(self.values(&y)?),
            Arg::Address(self.real(x)?),
            Arg::Int(n as i32),
            Arg::Int(run as i32),
            Arg::Int(layout.lane_shift as i32),
            Arg::Int(layout.panel_tokens as i32),
        ];
        let launch = Launch::blocks(y.shape().0, 512);
        self.launch("silu_mul", launch.early().mostly_shared(), &args)?;
        Ok(y)
    }
}
