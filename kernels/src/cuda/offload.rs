//! Tensors out of the way, in pinned host memory.

use std::sync::{Arc, Mutex};

use cudarc::driver::PinnedHostSlice;

use super::transfer::{Bytes, Transfers, lock};
use super::{Cuda, CudaTensor, Data};
use crate::{Error, Result};

/// Tensors that may be on their way to the host at once: more would only hold memory.
const LEAVING: usize = 2;

/// A tensor in pinned host memory. A clone shares it.
#[derive(Clone)]
pub struct CudaOffloaded {
    buffer: Arc<Buffer>,
    shape: (usize, usize),
}

struct Buffer {
    /// `None` only while being dropped.
    memory: Option<PinnedHostSlice<u8>>,
    home: Arc<Mutex<Vec<PinnedHostSlice<u8>>>>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            lock(&self.home).push(memory);
        }
    }
}

impl Cuda {
    /// Copies a tensor to pinned host memory, beside the computing that follows.
    pub(super) fn park_tensor(&self, x: &CudaTensor) -> Result<CudaOffloaded> {
        let failed = || Error::driver("copy from the GPU");
        x.check_order()?;
        let Data::Real(bytes) = &*x.data else {
            return Err(Error::shape("offload", "activations", "logits"));
        };
        self.arrived(bytes)?;
        let Transfers { down, pinned, leaving, .. } = &self.inner.transfers;
        let (size, row) = (x.shape.0 * x.shape.1 * self.dtype().size(), x.shape.1 * self.dtype().size());
        let idle = {
            let mut pinned = lock(pinned);
            let place = pinned.iter().position(|memory| memory.len() == size);
            place.map(|place| pinned.swap_remove(place))
        };
        let mut memory = match idle {
            Some(memory) => memory,
            // SAFETY: the copy below writes all of it.
            None => unsafe { down.context().alloc_pinned_with_flags(size, 0) }.map_err(failed())?,
        };
        self.let_follow(down)?;
        let view = bytes.slice()?.slice(x.first * row..x.first * row + size);
        down.memcpy_dtoh(&view, &mut memory).map_err(failed())?;
        let mut leaving = lock(leaving);
        if leaving.len() >= LEAVING {
            leaving.remove(0).0.synchronize().map_err(failed())?;
        }
        leaving.retain(|(event, _)| !event.is_complete());
        leaving.push((down.record_event(None).map_err(failed())?, x.clone()));
        let buffer = Buffer { memory: Some(memory), home: pinned.clone() };
        Ok(CudaOffloaded { buffer: Arc::new(buffer), shape: x.shape })
    }

    /// Starts the copy of a offloaded tensor back to the GPU.
    pub(super) fn fetch_tensor(&self, offloaded: &CudaOffloaded) -> Result<CudaTensor> {
        let failed = || Error::driver("copy to the GPU");
        let size = offloaded.shape.0 * offloaded.shape.1 * self.dtype().size();
        let mut slice = self.alloc::<u8>(size)?;
        let Transfers { up, leaving, .. } = &self.inner.transfers;
        self.let_follow(up)?;
        if let Some(memory) = &offloaded.buffer.memory {
            up.memcpy_htod(memory, &mut slice).map_err(failed())?;
        }
        let event = up.record_event(None).map_err(failed())?;
        lock(leaving).retain(|(event, _)| !event.is_complete());
        let bytes = Bytes::arriving(slice, Some(event));
        Ok(CudaTensor::new(Arc::new(Data::Real(bytes)), offloaded.shape))
    }
}
