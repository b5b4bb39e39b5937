//! The CPU backend: candle tensors in f32, products by faer, loops over rayon's threads.

pub(crate) mod block;
mod dense;
mod gram;
mod isa;
mod linear;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pages;
mod panels;
mod parts;
mod product;
mod reading;
mod sketch;
pub(crate) mod team;
mod vector;

use std::ops::{Deref, Range};
use std::time::Instant;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use faer::Par;
use parking_lot::RwLockReadGuard;

pub(crate) use dense::DenseRow;
pub(crate) use gram::add_gram;
pub(crate) use isa::Isa;
pub(crate) use linear::{GEMV_ROWS, RowSource, linear};
pub(crate) use pages::LongLived;
pub(crate) use panels::Panels;
pub(crate) use parts::{Parts, each_row, map, new_rows, zeroed};
pub(crate) use product::multiply;
pub use reading::ReadMemory;
pub(crate) use sketch::Sketch;
pub(crate) use vector::{
    axpy, dot, exp_columns, exp_in_place, maximum, prefetch, read_ahead, scale_columns, soft_cap, widen_codes,
};

use crate::{Batch, Device, Error, Result};

/// All cores of this machine, in f32.
#[derive(Clone, Debug, Default)]
pub struct Cpu;

impl Cpu {
    pub fn new() -> Self {
        Self
    }
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Offloaded = Tensor;
    type Order = ();
    type Graph = ();
    type Mark = Instant;

    fn name(&self) -> String {
        format!("CPU, {} threads", rayon::current_num_threads())
    }

    fn arithmetic(&self) -> String {
        "CPU, f32".into()
    }

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn seconds(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok((*to - *from).as_secs_f64())
    }

    fn tensor(&self, values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
        if values.len() != shape.0 * shape.1 {
            return Err(Error::shape("tensor", shape, values.len()));
        }
        Ok(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)
    }

    fn to_vec(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(View::of(x)?.to_vec())
    }

    fn element_size(&self) -> usize {
        size_of::<f32>()
    }

    fn offload(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn fetch(&self, offloaded: &Tensor) -> Result<Tensor> {
        Ok(offloaded.clone())
    }

    fn capture<E: From<Error>>(
        &self,
        _batch: &Batch,
        _step: &mut dyn FnMut() -> Result<Tensor, E>,
    ) -> Result<Option<()>, E> {
        Ok(None)
    }

    fn replay(&self, _recording: &(), _batch: &Batch) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn copy(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.copy()?)
    }

    fn shape(&self, x: &Tensor) -> (usize, usize) {
        x.dims2().unwrap_or((0, 0))
    }

    fn rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        Ok(x.narrow(0, range.start, range.len())?)
    }

    fn gather_rows(&self, x: &Tensor, indices: &[u32]) -> Result<Tensor> {
        let indices = Tensor::from_slice(indices, indices.len(), &candle_core::Device::Cpu)?;
        Ok(x.index_select(&indices, 0)?)
    }

    fn join_columns(&self, parts: &[Tensor]) -> Result<Tensor> {
        Ok(Tensor::cat(parts, 1)?.contiguous()?)
    }
}

/// How much of the machine one faer call may take.
pub(crate) fn all_cores() -> Par {
    Par::rayon(0)
}

/// The f32 values of a contiguous two-dimensional tensor, borrowed.
pub(crate) struct View<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    start: usize,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> View<'a> {
    pub fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let (Ok((rows, columns)), Some((start, _)), DType::F32) =
            (x.dims2(), layout.contiguous_offsets(), x.dtype())
        else {
            return Err(Error::shape("tensor", "contiguous f32 [rows, features]", x));
        };
        Ok(Self { storage, start, rows, columns })
    }
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..][..self.rows * self.columns],
            // `of` has checked the type, and this crate builds candle for the CPU alone.
            _ => &[],
        }
    }
}
