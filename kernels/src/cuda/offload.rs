//! Tensors out of the way, in pinned host memory.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaStream, PinnedHostSlice};

use super::transfer::{Bytes, Copying, Transfers, lock};
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
    memory: Option<Pinned>,
    home: Arc<Mutex<Vec<Pinned>>>,
}

/// Pinned host memory and the last copy that uses it. Copies to the GPU and from it have streams of their own: a tensor may
/// be fetched before it has arrived here, and memory may be taken for another one before it has left.
pub(super) struct Pinned {
    // Before the memory, so that it is dropped first.
    last: Copying,
    memory: PinnedHostSlice<u8>,
}

impl Pinned {
    /// Lets `stream` go on after the last copy that uses this memory.
    fn let_follow(&self, stream: &CudaStream) -> Result<()> {
        match &*lock(&self.last.0) {
            Some(event) => stream.wait(event).map_err(Error::driver("CUDA streams")),
            None => Ok(()),
        }
    }

    /// What `stream` has just been given is the last copy that uses this memory.
    fn used_by(&self, stream: &CudaStream) -> Result<()> {
        let event = stream.record_event(None).map_err(Error::driver("CUDA streams"))?;
        *lock(&self.last.0) = Some(event);
        Ok(())
    }
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
        let Transfers { down, pinned: home, leaving, .. } = &self.inner.transfers;
        let (size, row) = (x.shape.0 * x.shape.1 * self.dtype().size(), x.shape.1 * self.dtype().size());
        let idle = {
            let mut pinned = lock(home);
            let place = pinned.iter().position(|idle| idle.memory.len() == size);
            place.map(|place| pinned.swap_remove(place))
        };
        let mut pinned = match idle {
            Some(pinned) => pinned,
            None => {
                // SAFETY: the copy below writes all of it.
                let memory = unsafe { down.context().alloc_pinned_with_flags(size, 0) }.map_err(failed())?;
                Pinned { last: Copying::default(), memory }
            }
        };
        self.let_follow(down)?;
        pinned.let_follow(down)?;
        let view = bytes.slice()?.slice(x.first * row..x.first * row + size);
        down.memcpy_dtoh(&view, &mut pinned.memory).map_err(failed())?;
        pinned.used_by(down)?;
        let mut leaving = lock(leaving);
        if leaving.len() >= LEAVING {
            leaving.remove(0).0.synchronize().map_err(failed())?;
        }
        leaving.retain(|(event, _)| !event.is_complete());
        leaving.push((down.record_event(None).map_err(failed())?, x.clone()));
        let buffer = Buffer { memory: Some(pinned), home: home.clone() };
        Ok(CudaOffloaded { buffer: Arc::new(buffer), shape: x.shape })
    }

    /// Starts the copy of an offloaded tensor back to the GPU.
    pub(super) fn fetch_tensor(&self, offloaded: &CudaOffloaded) -> Result<CudaTensor> {
        let failed = || Error::driver("copy to the GPU");
        let size = offloaded.shape.0 * offloaded.shape.1 * self.dtype().size();
        let mut slice = self.alloc::<u8>(size)?;
        let Transfers { up, leaving, .. } = &self.inner.transfers;
        self.let_follow(up)?;
        if let Some(pinned) = &offloaded.buffer.memory {
            pinned.let_follow(up)?;
            up.memcpy_htod(&pinned.memory, &mut slice).map_err(failed())?;
            pinned.used_by(up)?;
        }
        let event = up.record_event(None).map_err(failed())?;
        lock(leaving).retain(|(event, _)| !event.is_complete());
        let bytes = Bytes::arriving(slice, Some(event));
        Ok(CudaTensor::new(Arc::new(Data::Real(bytes)), offloaded.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Dtype};

    /// Tensors of 64 MB: long enough on their way that what is done next meets them there.
    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn memory_of_a_tensor_on_its_way_back_is_not_written_by_the_next_one_that_leaves() {
        let shape = (1 << 12, 1 << 13);
        let gpu = Cuda::new(0, Dtype::F16, None).unwrap();
        let tensor = |value: f32| gpu.tensor(vec![value; shape.0 * shape.1], shape).unwrap();
        let (first, second) = (tensor(1.0), tensor(2.0));
        for _ in 0..4 {
            let offloaded = gpu.offload(&first).unwrap();
            // The first copy may still be under way: the tensor is fetched from where it has not yet arrived.
            let fetched = gpu.fetch(&offloaded).unwrap();
            drop(offloaded);
            let next = gpu.offload(&second).unwrap();
            assert!(gpu.to_vec(&fetched).unwrap().iter().all(|value| *value == 1.0), "the first tensor");
            let fetched = gpu.fetch(&next).unwrap();
            assert!(gpu.to_vec(&fetched).unwrap().iter().all(|value| *value == 2.0), "the second tensor");
        }
    }
}
