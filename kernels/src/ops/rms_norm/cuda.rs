use super::{RmsNorm, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("rms_norm.cu");

impl RmsNorm for Cuda {
    fn rms_norm(&self, x: &CudaTensor, weight: &CudaTensor, eps: f32) -> Result<CudaTensor> {
        let shape = self.shape(x);
        check(shape, self.shape(weight))?;
        let y = self.new_tensor(shape)?;
        let args = [
            Arg::Address(self.real(&y)?),
            Arg::Address(self.real(x)?),
            Arg::Address(self.real(weight)?),
            Arg::Int(shape.1 as i32),
            Arg::Float(eps),
        ];
        self.launch("rms_norm", Launch::blocks(shape.0, 256), &args)?;
        Ok(y)
    }
}
