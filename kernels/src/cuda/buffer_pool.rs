//! Buffers that are used again: asking the driver for memory costs more than many kernels of decoding take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::CudaSlice;

use super::{Bytes, Cuda};
use crate::Result;

/// Larger buffers go back to the pool, since they are few and memory is dear.
const LARGEST: usize = 1 << 20;

/// Free bytes that the shared pool holds at most: batches of ever new sizes would fill the GPU with them.
const CAPACITY: usize = 256 << 20;

/// Free buffers by their size. Everything computes on one stream, so what was dropped may be written at once.
pub(crate) struct BufferPool {
    free: Mutex<Free>,
    largest: usize,
    capacity: usize,
}

#[derive(Default)]
struct Free {
    by_size: HashMap<usize, Vec<CudaSlice<u8>>>,
    bytes: usize,
}

impl BufferPool {
    pub fn common() -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), largest: LARGEST, capacity: CAPACITY })
    }

    /// For a captured step: every buffer comes back, whatever its size, and is handed out to no other use.
    pub fn private() -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), largest: usize::MAX, capacity: usize::MAX })
    }

    fn take(&self, size: usize) -> Option<CudaSlice<u8>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let slice = free.by_size.get_mut(&size)?.pop()?;
        free.bytes -= size;
        Some(slice)
    }

    pub fn put(&self, slice: CudaSlice<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // Beyond the capacity it goes back to the pool.
        if free.bytes.saturating_add(slice.len()) <= self.capacity {
            free.bytes += slice.len();
            free.by_size.entry(slice.len()).or_default().push(slice);
        }
    }
}

impl Cuda {
    /// Memory for something that a kernel writes and that soon goes out of use.
    pub(crate) fn scratch(&self, size: usize) -> Result<Bytes> {
        let buffers = self.inner.buffers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let size = size.max(1);
        if size > buffers.largest {
            return Ok(self.alloc::<u8>(size)?.into());
        }
        let slice = match buffers.take(size) {
            Some(slice) => slice,
            None => self.alloc(size)?,
        };
        Ok(Bytes::pooled(slice, buffers))
    }

    /// Takes buffers from another pool from now on; returns the one before.
    pub(super) fn use_buffers(&self, buffers: Arc<BufferPool>) -> Arc<BufferPool> {
        std::mem::replace(&mut self.inner.buffers.lock().unwrap_or_else(PoisonError::into_inner), buffers)
    }
}
