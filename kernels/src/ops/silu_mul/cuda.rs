use super::{SiluMul, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("silu_mul.cu");

impl SiluMul for Cuda {
    fn silu_mul(&self, x: &CudaTensor) -> Result<CudaTensor> {
        let n = check(self.shape(x))?;
        let y = self.new_tensor((self.shape(x).0, n))?;
        let args = [Arg::Address(self.real(&y)?), Arg::Address(self.real(x)?), Arg::Int(n as i32)];
        self.launch("silu_mul", Launch::blocks(y.shape().0, 256), &args)?;
        Ok(y)
    }
}
