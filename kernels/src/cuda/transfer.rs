//! Between host and GPU. Small things go at once on the one stream; large ones through pinned memory on
//! streams of their own, beside the computing, and the first use waits for them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::NoUninit;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, PinnedHostSlice};
use rayon::prelude::*;

use super::answer::Pieces;
use super::buffer_pool::BufferPool;
use super::offload::Pinned;
use super::{Cuda, CudaTensor};
use crate::error::expect;
use crate::{Error, HostTensor, Result};

/// Bytes of one pinned buffer that large uploads go through, and how many there are.
const CHUNK: usize = 16 << 20;
const CHUNKS: usize = 6;

/// Bytes that one thread copies into such a buffer at a time.
const PIECE: usize = 256 << 10;

/// From here on an upload goes through pinned memory: the driver waits with larger ones until their turn has come.
const LARGE: usize = 64 << 10;

/// Bytes on the GPU that may still be under way.
pub(crate) struct Bytes {
    // Before the memory, so that it is dropped first.
    arrival: Copying,
    slice: Memory,
}

/// Memory, and the pool where it is put when it goes out of use.
struct Memory {
    /// `None` only while being dropped.
    slice: Option<CudaSlice<u8>>,
    buffers: Option<Arc<BufferPool>>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let (Some(slice), Some(buffers)) = (self.slice.take(), &self.buffers) {
            buffers.put(slice);
        }
    }
}

/// An event behind the last copy to or from some memory; `None` where there was none, or where the computing stream waits
/// for it already. The memory's owner drops it first, which waits until the copy is done.
#[derive(Default)]
pub(super) struct Copying(pub(super) Mutex<Option<CudaEvent>>);

impl Drop for Copying {
    fn drop(&mut self) {
        // Memory must not be freed while a copy uses it.
        if let Some(event) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = event.synchronize();
        }
    }
}

impl Bytes {
    pub(super) fn arriving(slice: CudaSlice<u8>, arrival: Option<CudaEvent>) -> Self {
        let slice = Memory { slice: Some(slice), buffers: None };
        Self { arrival: Copying(Mutex::new(arrival)), slice }
    }

    /// Memory that goes to `pool` when it is dropped.
    pub(super) fn pooled(slice: CudaSlice<u8>, buffers: Arc<BufferPool>) -> Self {
        let slice = Memory { slice: Some(slice), buffers: Some(buffers) };
        Self { arrival: Copying::default(), slice }
    }

    pub(super) fn slice(&self) -> Result<&CudaSlice<u8>> {
        self.slice.slice.as_ref().ok_or_else(|| Error::cuda("memory", "it was dropped"))
    }
}

impl From<CudaSlice<u8>> for Bytes {
    fn from(slice: CudaSlice<u8>) -> Self {
        Self::arriving(slice, None)
    }
}

/// The streams and buffers of large copies.
pub(super) struct Transfers {
    pub(super) up: Arc<CudaStream>,
    pub(super) down: Arc<CudaStream>,
    ring: Mutex<Ring>,
    pub(super) answers: Pieces,
    /// Pinned memory that no offloaded tensor uses any more.
    pub(super) pinned: Arc<Mutex<Vec<Pinned>>>,
    /// Tensors whose memory a copy to the host still reads.
    pub(super) leaving: Mutex<Vec<(CudaEvent, CudaTensor)>>,
}

/// Pinned buffers that take turns, through all uploads.
#[derive(Default)]
struct Ring {
    /// Made at the first uploads.
    chunks: Vec<Chunk>,
    turn: usize,
}

struct Chunk {
    buffer: PinnedHostSlice<u8>,
    /// The last copy out of it.
    sent: Option<CudaEvent>,
}

impl Ring {
    /// The chunk whose turn it is, once what was sent of it has arrived.
    fn next(&mut self, up: &CudaStream) -> Result<&mut Chunk> {
        let failed = || Error::driver("copy to the GPU");
        let turn = self.turn;
        if turn == self.chunks.len() {
            // SAFETY: a chunk is written before it is sent.
            let buffer = unsafe { up.context().alloc_pinned_with_flags(CHUNK, 0) }.map_err(failed())?;
            self.chunks.push(Chunk { buffer, sent: None });
        }
        self.turn = (turn + 1) % CHUNKS;
        let chunk = &mut self.chunks[turn];
        if let Some(sent) = chunk.sent.take() {
            sent.synchronize().map_err(failed())?;
        }
        Ok(chunk)
    }
}

impl Transfers {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let another = || stream.context().new_stream().map_err(Error::driver("CUDA"));
        Ok(Self {
            up: another()?,
            down: another()?,
            ring: Mutex::default(),
            answers: Pieces::default(),
            pinned: Arc::default(),
            leaving: Mutex::default(),
        })
    }
}

impl Cuda {
    pub(crate) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        let mut slice = self.alloc(values.len())?;
        if !values.is_empty() {
            self.inner.stream.memcpy_htod(values, &mut slice).map_err(Error::driver("copy to the GPU"))?;
        }
        Ok(slice)
    }

    /// New values in the place of old ones, after what has read those.
    pub(crate) fn overwrite<T: DeviceRepr>(&self, slice: &CudaSlice<T>, values: &[T]) -> Result<()> {
        expect("overwrite", slice.len(), values.len())?;
        // SAFETY: the lengths agree; the copy is ordered on the stream like every other use, and pageable
        // memory is read before the call returns.
        unsafe {
            cudarc::driver::result::memcpy_htod_async(
                self.address(slice),
                values,
                self.inner.stream.cu_stream(),
            )
        }
        .map_err(Error::driver("copy to the GPU"))
    }

    /// Copies a range of values to the same place of another slice.
    pub(crate) fn copy_range<T: DeviceRepr>(
        &self,
        from: &CudaSlice<T>,
        to: &mut CudaSlice<T>,
        range: Range<usize>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (from, mut to) = (from.slice(range.clone()), to.slice_mut(range));
        self.inner.stream.memcpy_dtod(&from, &mut to).map_err(Error::driver("copy on the GPU"))
    }

    pub(crate) fn download<T: DeviceRepr + Default + Clone>(&self, view: &CudaView<T>) -> Result<Vec<T>> {
        let mut values = vec![T::default(); view.len()];
        if !values.is_empty() {
            self.inner.stream.memcpy_dtoh(view, &mut values).map_err(Error::driver("copy from the GPU"))?;
        }
        self.inner.stream.synchronize().map_err(Error::driver("copy from the GPU"))?;
        Ok(values)
    }

    /// The same beside the computing that follows; only the calling thread waits.
    pub(crate) fn download_aside<T: DeviceRepr + Default + Clone>(
        &self,
        slice: &CudaSlice<T>,
    ) -> Result<Vec<T>> {
        let failed = || Error::driver("copy from the GPU");
        let down = &self.inner.transfers.down;
        self.let_follow(down)?;
        let mut values = vec![T::default(); slice.len()];
        down.memcpy_dtoh(slice, &mut values).map_err(failed())?;
        down.synchronize().map_err(failed())?;
        Ok(values)
    }

    /// The address of bytes that the computing stream will find arrived.
    pub(crate) fn arrived(&self, bytes: &Bytes) -> Result<u64> {
        if let Some(event) = lock(&bytes.arrival.0).take() {
            self.inner.stream.wait(&event).map_err(Error::driver("copy to the GPU"))?;
        }
        Ok(self.address(bytes.slice()?))
    }

    /// A part of some bytes, arrived.
    pub(crate) fn view<'a>(&self, bytes: &'a Bytes, range: Range<usize>) -> Result<CudaView<'a, u8>> {
        self.arrived(bytes)?;
        Ok(bytes.slice()?.slice(range))
    }

    /// Host tensors end to end in the compute type.
    pub(crate) fn upload_real(&self, parts: &[HostTensor]) -> Result<Bytes> {
        let dtype = self.dtype();
        let converted: Vec<Option<Vec<u8>>> =
            parts.iter().map(|part| (part.dtype != dtype).then(|| self.encode(&part.to_f32()))).collect();
        let parts = parts.iter().zip(&converted).map(|(part, other)| other.as_deref().unwrap_or(part.bytes));
        self.upload_bytes(&parts.collect::<Vec<_>>())
    }

    /// Bytes of several places end to end on the GPU.
    pub(crate) fn upload_bytes(&self, parts: &[&[u8]]) -> Result<Bytes> {
        let mut slice = self.alloc::<u8>(parts.iter().map(|part| part.len()).sum())?;
        let arrival = self.send(parts, &mut slice.as_view_mut())?;
        Ok(Bytes::arriving(slice, arrival))
    }

    /// Values of several places end to end on the GPU.
    pub(crate) fn upload_parts<T: DeviceRepr + NoUninit>(&self, parts: &[&[T]]) -> Result<CudaSlice<T>> {
        let mut slice = self.alloc::<T>(parts.iter().map(|part| part.len()).sum())?;
        let bytes: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(part)).collect();
        let length = bytes.iter().map(|part| part.len()).sum();
        // SAFETY: these are bytes of the values that are copied.
        let target = unsafe { slice.transmute_mut::<u8>(length) };
        let mut target = target.ok_or_else(|| Error::shape("upload", length, parts.len()))?;
        if let Some(arrival) = self.send(&bytes, &mut target)? {
            self.inner.stream.wait(&arrival).map_err(Error::driver("copy to the GPU"))?;
        }
        Ok(slice)
    }

    /// Sends bytes to the GPU, many of them through the pinned chunks: then the end of the last copy is returned.
    fn send(&self, parts: &[&[u8]], slice: &mut CudaViewMut<u8>) -> Result<Option<CudaEvent>> {
        let failed = || Error::driver("copy to the GPU");
        let mut start = 0;
        if slice.len() < LARGE {
            for part in parts.iter().filter(|part| !part.is_empty()) {
                let mut target = slice.slice_mut(start..start + part.len());
                self.inner.stream.memcpy_htod(*part, &mut target).map_err(failed())?;
                start += part.len();
            }
            return Ok(None);
        }
        let Transfers { up, ring, .. } = &self.inner.transfers;
        self.let_follow(up)?;
        let mut ring = lock(ring);
        let mut pieces = parts.iter().flat_map(|part| part.chunks(PIECE)).peekable();
        while pieces.peek().is_some() {
            let Chunk { buffer, sent } = ring.next(up)?;
            let mut length = 0;
            let fitting = std::iter::from_fn(|| {
                pieces.next_if(|piece| length + piece.len() <= CHUNK).inspect(|piece| length += piece.len())
            });
            let fitting: Vec<&[u8]> = fitting.collect();
            let buffer = &mut buffer.as_mut_slice().map_err(failed())?[..length];
            gather(buffer, &fitting);
            up.memcpy_htod(&*buffer, &mut slice.slice_mut(start..start + length)).map_err(failed())?;
            *sent = Some(up.record_event(None).map_err(failed())?);
            start += length;
        }
        up.record_event(None).map(Some).map_err(failed())
    }

    /// What is queued on `stream` from now on runs after what the computing stream has queued so far.
    pub(super) fn let_follow(&self, stream: &CudaStream) -> Result<()> {
        stream.join(&self.inner.stream).map_err(Error::driver("CUDA streams"))
    }
}

/// Copies pieces end to end, on all threads.
fn gather(mut target: &mut [u8], pieces: &[&[u8]]) {
    let place = |piece: &&[u8]| target.split_off_mut(..piece.len());
    let places: Vec<&mut [u8]> = pieces.iter().filter_map(place).collect();
    places.into_par_iter().zip(pieces).for_each(|(to, from)| to.copy_from_slice(from));
}

/// A lock that a failed thread does not take with it: the data are handles, always whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
