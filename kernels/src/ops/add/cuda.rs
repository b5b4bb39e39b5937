use super::{Add, check};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("add.cu");

impl Add for Cuda {
    fn add(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        let shape = self.shape(a);
        check(shape, self.shape(b))?;
        let y = self.new_tensor(shape)?;
        let count = shape.0 * shape.1;
        let args = Args::new([self.real(&y)?, self.real(a)?, self.real(b)?]).long(count);
        self.launch("add", Launch::threads(count.div_ceil(8)), &args)?;
        Ok(y)
    }
}
