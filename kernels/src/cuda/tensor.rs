//! Activations on the GPU.

use std::sync::Arc;

use super::{Args, Bytes, Cuda, CudaOrder, Launch, Layout};
use crate::{Error, Result};

/// Activations on the GPU, row-major. A clone shares the memory; so does a range of rows.
#[derive(Clone)]
pub struct CudaTensor {
    pub(super) data: Arc<Data>,
    /// First row of this tensor in `data`.
    pub(super) first: usize,
    pub(super) shape: (usize, usize),
    /// Which feature is where; `None` for the model's own order, row after row.
    pub(super) order: Option<CudaOrder>,
}

pub(super) enum Data {
    /// In the compute type.
    Real(Bytes),
    /// Logits and rotary frequencies.
    Wide(Bytes),
}

impl Cuda {
    /// A new tensor in the compute type for a kernel to fill.
    pub(crate) fn new_tensor(&self, shape: (usize, usize)) -> Result<CudaTensor> {
        let data = Arc::new(Data::Real(self.scratch(shape.0 * shape.1 * self.dtype().size())?));
        Ok(CudaTensor::new(data, shape))
    }

    /// The same with its features as a weight wants them.
    pub(crate) fn new_tensor_in(
        &self,
        shape: (usize, usize),
        order: Option<&CudaOrder>,
    ) -> Result<(CudaTensor, Layout)> {
        let layout = Layout::of(self, order, shape.0);
        let y = self.new_tensor((shape.0.max(layout.panel_tokens), shape.1))?;
        Ok((CudaTensor { shape, order: order.cloned(), ..y }, layout))
    }

    /// The same in f32, whatever the compute type.
    pub(crate) fn new_wide_tensor(&self, shape: (usize, usize)) -> Result<CudaTensor> {
        let data = Arc::new(Data::Wide(self.scratch(4 * shape.0 * shape.1)?));
        Ok(CudaTensor::new(data, shape))
    }

    /// Address of a tensor's values in the compute type, features in the model's own order.
    pub(crate) fn real(&self, x: &CudaTensor) -> Result<u64> {
        x.check_order()?;
        self.values(x)
    }

    /// The same of a tensor that there may be; 0 where there is none.
    pub(crate) fn real_or_none(&self, x: Option<&CudaTensor>) -> Result<u64> {
        x.map_or(Ok(0), |x| self.real(x))
    }

    /// The same in whatever order the features are.
    pub(crate) fn values(&self, x: &CudaTensor) -> Result<u64> {
        match &*x.data {
            Data::Real(bytes) => {
                Ok(self.arrived(bytes)? + (self.dtype().size() * x.first * x.shape.1) as u64)
            }
            Data::Wide(_) => Err(Error::shape("tensor", "activations", "logits")),
        }
    }

    /// Address of a tensor's f32 values.
    pub(crate) fn wide(&self, x: &CudaTensor) -> Result<u64> {
        match &*x.data {
            Data::Wide(bytes) => Ok(self.arrived(bytes)? + 4 * (x.first * x.shape.1) as u64),
            Data::Real(_) => Err(Error::shape("tensor", "logits", "activations")),
        }
    }

    /// The same features in the order that a weight wants.
    pub(crate) fn in_order(&self, x: &CudaTensor, order: Option<&CudaOrder>) -> Result<CudaTensor> {
        match (x.order(), order) {
            (None, None) => Ok(x.clone()),
            (Some(has), Some(wants)) if has.is(wants) => Ok(x.clone()),
            (None, Some(wants)) => {
                if wants.layout(self, x.shape.0).features == 0 {
                    return Ok(x.clone().said_to_be_in(order));
                }
                let (y, layout) = self.new_tensor_in(x.shape, order)?;
                let args = Args::new([self.values(&y)?, self.real(x)?, layout.features])
                    .ints([x.shape.1, layout.panel_tokens]);
                let launch = Launch::blocks(x.shape.0, 512).shared(x.shape.1 * self.dtype().size());
                self.launch("order_columns", launch.early().mostly_shared(), &args)?;
                Ok(y)
            }
            _ => Err(Error::shape("tensor", "features in the order of its weight", "another weight's")),
        }
    }
}

impl CudaTensor {
    pub(super) fn new(data: Arc<Data>, shape: (usize, usize)) -> Self {
        Self { data, first: 0, shape, order: None }
    }

    /// The same memory, said to hold its features in `order`.
    pub(crate) fn said_to_be_in(self, order: Option<&CudaOrder>) -> Self {
        Self { order: order.cloned(), ..self }
    }

    /// Whether no other tensor shares its memory.
    pub(crate) fn is_alone(&mut self) -> bool {
        Arc::get_mut(&mut self.data).is_some()
    }

    /// Operations that know nothing of orders must not get such a tensor.
    pub(super) fn check_order(&self) -> Result<()> {
        match self.order {
            None => Ok(()),
            Some(_) => Err(Error::shape("tensor", "features in the model's order", "a weight's order")),
        }
    }

    pub(crate) fn order(&self) -> Option<&CudaOrder> {
        self.order.as_ref()
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }
}
