//! Activations on the card, and the order of their columns.

use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::{Arg, Bytes, Cuda, Launch};
use crate::{Error, Result};

/// Activations on the card, row-major. A clone shares the memory; so does a range of rows.
#[derive(Clone)]
pub struct CudaTensor {
    pub(super) data: Arc<Data>,
    /// First row of this tensor in `data`.
    pub(super) first: usize,
    pub(super) shape: (usize, usize),
    /// Which feature is in which column; `None` for the model's own order.
    pub(super) order: Option<CudaOrder>,
}

/// An order of features. A clone is the same one; equal orders of different weights are not known to be.
#[derive(Clone)]
pub struct CudaOrder(Arc<OrderTables>);

struct OrderTables {
    /// Feature at each place.
    features: CudaSlice<u32>,
    /// Place of each feature.
    places: CudaSlice<u32>,
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
                let y = self.new_tensor(x.shape)?;
                let args = [
                    Arg::Address(self.real(&y)?),
                    Arg::Address(self.real(x)?),
                    Arg::Address(wants.features(self)),
                    Arg::Int(x.shape.1 as i32),
                ];
                let launch = Launch::blocks(x.shape.0, 256).shared(x.shape.1 * self.dtype().size());
                self.launch("order_columns", launch, &args)?;
                Ok(y.said_to_be_in(order))
            }
            _ => Err(Error::shape("tensor", "features in the order of its weight", "another weight's")),
        }
    }
}

impl CudaOrder {
    /// `features[place]`: every feature once.
    pub(crate) fn new(card: &Cuda, features: &[u32]) -> Result<Self> {
        let mut places = vec![0; features.len()];
        features.iter().zip(0..).for_each(|(feature, place)| places[*feature as usize] = place);
        Ok(Self(Arc::new(OrderTables { features: card.upload(features)?, places: card.upload(&places)? })))
    }

    /// Address of the feature at each place.
    pub(crate) fn features(&self, card: &Cuda) -> u64 {
        card.address(&self.0.features)
    }

    /// Address of each feature's place.
    pub(crate) fn places(&self, card: &Cuda) -> u64 {
        card.address(&self.0.places)
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
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

    /// Whoever knows nothing of orders must not be given one.
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
