//! Memory of the GPU: a pool that keeps what is freed, and a limit that can make the GPU smaller than it is.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{CudaContext, CudaSlice, DeviceRepr, ValidAsZeroBits, sys};

use super::Cuda;
use crate::{Error, Memory, Result};

/// What the context, the libraries and their work spaces take of a GPU beside the pool.
const OVERHEAD: usize = 1 << 30;

/// What of that may still be to come once they are loaded.
const RESERVE: usize = 512 << 20;

/// The program's share of the GPU.
pub(super) struct Pool {
    handle: sys::CUmemoryPool,
    /// Bytes that this program may have in use at once.
    available: usize,
}

// SAFETY: the handle is the device's default pool, which lives as long as the driver and locks itself.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// The default pool of the context's GPU. `limit` acts as if the GPU had that many bytes in all.
    pub fn new(context: &Arc<CudaContext>, limit: Option<usize>) -> Result<Self> {
        let failed = || Error::driver("memory pool");
        if !context.has_async_alloc() {
            return Err(Error::cuda("CUDA", "the GPU's driver has no memory pools (CUDA 11.2 or later has)"));
        }
        let (free, _) = context.mem_get_info().map_err(failed())?;
        let within = limit.map_or(usize::MAX, |limit| limit.saturating_sub(OVERHEAD));
        let available = free.saturating_sub(RESERVE).min(within);
        if available == 0 {
            let problem = format!(
                "{} free{} leave nothing beside the {} that CUDA itself takes",
                gigabytes(free),
                limit.map_or(String::new(), |limit| format!(" and a limit of {}", gigabytes(limit))),
                gigabytes(OVERHEAD)
            );
            return Err(Error::cuda("GPU memory", problem));
        }
        let mut handle = std::ptr::null_mut();
        let mut threshold = u64::MAX;
        let release = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool belongs to the device of this context, and the attribute is a 64-bit number.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut handle, context.cu_device()).result().map_err(failed())?;
            let value = std::ptr::from_mut(&mut threshold).cast();
            sys::cuMemPoolSetAttribute(handle, release, value).result().map_err(failed())?;
        }
        Ok(Self { handle, available })
    }

    fn bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: the pool is alive, and these attributes are 64-bit numbers.
        unsafe {
            let value = std::ptr::from_mut(&mut bytes).cast();
            sys::cuMemPoolGetAttribute(self.handle, attribute, value).result()
        }
        .map_err(Error::driver("memory pool"))?;
        Ok(bytes as usize)
    }

    fn used(&self) -> Result<usize> {
        self.bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    pub fn memory(&self) -> Result<Memory> {
        let peak = self.bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
        Ok(Memory { used: self.used()?, peak, available: self.available })
    }
}

impl Cuda {
    /// Memory that nothing was written to yet.
    pub(crate) fn alloc<T: DeviceRepr>(&self, length: usize) -> Result<CudaSlice<T>> {
        let bytes = length.max(1) * size_of::<T>();
        if self.inner.capturing.load(Ordering::Relaxed) {
            return Err(Error::cuda("capturing a step", "it asks for memory"));
        }
        let pool = &self.inner.pool;
        if pool.used()? + bytes > pool.available {
            // What was freed counts until the stream has come to it.
            self.inner.stream.synchronize().map_err(Error::driver("synchronize"))?;
            let used = pool.used()?;
            if used + bytes > pool.available {
                return Err(out_of_memory(bytes, used, pool.available));
            }
        }
        // SAFETY: every caller hands the memory to a kernel, product or copy that writes all of it.
        unsafe { self.inner.stream.alloc(length.max(1)) }
            .map_err(|_| out_of_memory(bytes, pool.used().unwrap_or_default(), pool.available))
    }

    pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, length: usize) -> Result<CudaSlice<T>> {
        let mut slice = self.alloc(length)?;
        self.inner.stream.memset_zeros(&mut slice).map_err(Error::driver("clearing memory"))?;
        Ok(slice)
    }
}

fn out_of_memory(asked: usize, used: usize, available: usize) -> Error {
    let problem = format!(
        "{} more were needed beside {} in use, and the GPU has {} for this program",
        gigabytes(asked),
        gigabytes(used),
        gigabytes(available)
    );
    Error::cuda("GPU memory", problem)
}

fn gigabytes(bytes: usize) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}
