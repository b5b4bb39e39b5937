//! What kernels answer the host: a few bytes, on their way through pinned memory while the host does something else.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, CudaView, DevicePtr, PinnedHostSlice};

use super::Cuda;
use super::transfer::lock;
use crate::{Error, Result};

/// Pinned memory is asked for in pieces of at least so many bytes.
const PIECE: usize = 64 << 10;

/// Pinned memory that no answer uses.
pub(super) type Pieces = Arc<Mutex<Vec<PinnedHostSlice<u8>>>>;

/// Bytes that come to the host.
pub(crate) struct Answer {
    /// `None` only while being dropped.
    memory: Mutex<Option<PinnedHostSlice<u8>>>,
    bytes: usize,
    arrived: CudaEvent,
    pieces: Pieces,
}

impl Cuda {
    /// Sends what the kernels asked for so far have written, and goes on.
    pub(crate) fn answer(&self, view: &CudaView<u8>) -> Result<Answer> {
        let failed = || Error::driver("copy from the GPU");
        let (stream, pieces) = (&self.inner.stream, &self.inner.transfers.answers);
        let fitting = {
            let mut pieces = lock(pieces);
            let place = pieces.iter().position(|piece| piece.len() >= view.len());
            place.map(|place| pieces.swap_remove(place))
        };
        let mut memory = match fitting {
            Some(memory) => memory,
            // SAFETY: what is read of it was copied there before.
            None => unsafe { stream.context().alloc_pinned_with_flags(PIECE.max(view.len()), 0) }
                .map_err(failed())?,
        };
        if !view.is_empty() {
            let target = &mut memory.as_mut_slice().map_err(failed())?[..view.len()];
            let (address, _guard) = view.device_ptr(stream);
            // SAFETY: both sides have so many bytes. They are not read before the event; the next user of this piece
            // writes it by a copy of the same stream.
            unsafe { cudarc::driver::result::memcpy_dtoh_async(target, address, stream.cu_stream()) }
                .map_err(failed())?;
        }
        let arrived = stream.record_event(None).map_err(failed())?;
        Ok(Answer { memory: Mutex::new(Some(memory)), bytes: view.len(), arrived, pieces: pieces.clone() })
    }
}

impl Answer {
    /// Waits for the answer, whole 32-bit words.
    pub fn words(&self) -> Result<Vec<u32>> {
        let failed = || Error::driver("copy from the GPU");
        self.arrived.synchronize().map_err(failed())?;
        let memory = lock(&self.memory);
        let memory = memory.as_ref().ok_or_else(|| Error::cuda("memory", "it was dropped"))?;
        let bytes = &memory.as_slice().map_err(failed())?[..self.bytes];
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(memory) = lock(&self.memory).take() {
            lock(&self.pieces).push(memory);
        }
    }
}
