use super::{Scale, check_cap};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
use crate::ops::add;
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("scale.cu");

impl Scale for Cuda {
    fn scale(&self, x: &CudaTensor, factor: f32) -> Result<CudaTensor> {
        self.scaled(None, x, factor)
    }

    fn add_scaled(&self, a: &CudaTensor, b: &CudaTensor, factor: f32) -> Result<CudaTensor> {
        add::check(self.shape(a), self.shape(b))?;
        self.scaled(Some(a), b, factor)
    }

    fn cap_scores(&self, scores: &CudaTensor, factor: f32, cap: Option<f32>) -> Result<CudaTensor> {
        check_cap(cap)?;
        let shape = self.shape(scores);
        let y = self.new_wide_tensor(shape)?;
        let args = Args::new([self.wide(&y)?, self.wide(scores)?])
            .floats([factor, cap.unwrap_or(0.0)])
            .long(shape.0 * shape.1);
        self.launch("cap_scores", Launch::threads(shape.0 * shape.1).early(), &args)?;
        Ok(y)
    }
}

impl Cuda {
    /// `a + factor b`
    fn scaled(&self, a: Option<&CudaTensor>, b: &CudaTensor, factor: f32) -> Result<CudaTensor> {
        let shape = self.shape(b);
        let y = self.new_tensor(shape)?;
        let count = shape.0 * shape.1;
        let args =
            Args::new([self.real(&y)?, self.real_or_none(a)?, self.real(b)?]).floats([factor]).long(count);
        self.launch("add_scaled", Launch::threads(count.div_ceil(8)).early(), &args)?;
        Ok(y)
    }
}
