use super::{Activation, CUBIC, Gated, LINEAR, check};
use crate::cuda::{Arg, Args, Cuda, CudaOrder, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("gated.cu");
pub(crate) const ACTIVATION_SOURCE: &str = include_str!("activation.cu");

impl Activation {
    /// `struct Gate` of the kernels: what the argument of the exponential is made of. Zeros stand for the exact form,
    /// which has none.
    pub(crate) fn gate(self) -> Arg {
        Arg::Gate(match self {
            Self::Silu => [1.0, 0.0],
            Self::GeluTanh => [LINEAR, CUBIC],
            Self::Gelu => [0.0, 0.0],
        })
    }
}

impl Gated for Cuda {
    fn gated(&self, x: &CudaTensor, activation: Activation) -> Result<CudaTensor> {
        self.gated_in_order(x, check(self.shape(x))?, activation, None)
    }
}

impl Cuda {
    /// The same for gates and what they gate in runs of `run`, which are in `order` already.
    pub(crate) fn gated_in_order(
        &self,
        x: &CudaTensor,
        run: usize,
        activation: Activation,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        let n = check(self.shape(x))?;
        let (y, layout) = self.new_tensor_in((self.shape(x).0, n), order)?;
        let args = Args::new([self.values(&y)?, self.real(x)?])
            .ints([n, run, layout.lane_shift, layout.panel_tokens])
            .and(activation.gate());
        let launch = Launch::blocks(y.shape().0, 512);
        self.launch("gated", launch.early().mostly_shared(), &args)?;
        Ok(y)
    }
}
