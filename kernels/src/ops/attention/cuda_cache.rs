//! A GPU's KV cache.

use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::kv_cache::{KvDtype, KvShape};
use super::{AttentionShape, step};
use crate::cuda::{Arg, Args, BatchMetadata, Cuda, CudaTensor, Launch};
use crate::{Batch, Device, Result};

pub(crate) const SOURCE: &str = include_str!("kv_int8.cu");

/// Threads of a block that stores or decodes, and blocks that share the decoding of a sequence's head at most.
const THREADS: u32 = 256;
const DECODERS: usize = 32;

/// Keys and values of one layer.
pub struct CudaKvCache {
    pub(super) shape: KvShape,
    pub(super) kept: Kept,
    /// The layers have them in turn.
    pub(super) shares: Arc<step::Shares>,
}

pub(super) enum Kept {
    Real(Real),
    Codes(Codes),
}

/// In the compute type, `[blocks * KV_BLOCK_ROWS, kv_heads * head_dim]` each.
pub(super) struct Real {
    k: CudaSlice<u8>,
    v: CudaSlice<u8>,
}

/// As bytes: `struct CodedCache` of the kernels.
pub(super) struct Codes {
    /// `[blocks, kv_heads, KV_BLOCK_ROWS, head_dim]`
    k: CudaSlice<u8>,
    v: CudaSlice<u8>,
    /// f32 `[blocks, kv_heads, KV_BLOCK_ROWS]`
    k_scales: CudaSlice<u8>,
    v_scales: CudaSlice<u8>,
    /// Where a batch's keys and values go for kernels that know no codes; every layer's in turn, block for block. Of a
    /// fixed size, so that contexts may grow in a captured step and no memory is asked for while serving.
    decoded: Arc<Real>,
}

impl Cuda {
    /// Beside the layers' own memory a cache of bytes takes that of one layer in the compute type.
    pub(super) fn new_caches(&self, layers: usize, shape: KvShape) -> Result<Vec<CudaKvCache>> {
        shape.check()?;
        let places = shape.rows() * shape.kv_heads;
        let real = || -> Result<Real> {
            let length = places * shape.head_dim * self.dtype().size();
            Ok(Real { k: self.zeros(length)?, v: self.zeros(length)? })
        };
        let codes = |decoded: &Arc<Real>| -> Result<Codes> {
            let (codes, scales) = (places * shape.head_dim, places * size_of::<f32>());
            Ok(Codes {
                k: self.zeros(codes)?,
                v: self.zeros(codes)?,
                k_scales: self.zeros(scales)?,
                v_scales: self.zeros(scales)?,
                decoded: decoded.clone(),
            })
        };
        let decoded = (shape.dtype == KvDtype::Int8).then(real).transpose()?.map(Arc::new);
        let shares = Arc::new(self.step_shares(shape.head_dim)?);
        let layer = || {
            let kept = match &decoded {
                Some(decoded) => Kept::Codes(codes(decoded)?),
                None => Kept::Real(real()?),
            };
            Ok(CudaKvCache { shape, kept, shares: shares.clone() })
        };
        (0..layers).map(|_| layer()).collect()
    }

    /// Stores the batch's keys and values; returns where kernels in the compute type find all that the batch sees.
    pub(super) fn append(
        &self,
        cache: &mut CudaKvCache,
        [k, v]: [&CudaTensor; 2],
        (batch, metadata): (&Batch, &BatchMetadata),
        shape: &AttentionShape,
    ) -> Result<[u64; 2]> {
        let rows = self.shape(k).0;
        let new = [self.real(k)?, self.real(v)?, metadata.slots(self)];
        let (kv_heads, head) = (shape.kv_heads, shape.head_dim);
        match &cache.kept {
            Kept::Real(real) => {
                let args = Args::new(real.addresses(self)).addresses(new).ints([kv_heads * head]);
                self.launch("kv_append", Launch::blocks(rows, THREADS), &args)?;
                Ok(real.addresses(self))
            }
            Kept::Codes(codes) => {
                let args = Args::new([]).and(codes.arg(self)).addresses(new).ints([kv_heads, head]);
                self.launch("kv_append_int8", Launch::blocks(rows, THREADS), &args)?;
                self.decode_codes(codes, (batch, metadata), shape)
            }
        }
    }

    /// Decodes what the batch sees. As many threads whatever the contexts are, so that a captured step fits all.
    fn decode_codes(
        &self,
        codes: &Codes,
        (batch, metadata): (&Batch, &BatchMetadata),
        shape: &AttentionShape,
    ) -> Result<[u64; 2]> {
        let decoded = codes.decoded.addresses(self);
        let sizes = [shape.kv_heads, shape.head_dim, shape.window.unwrap_or(0)];
        let args = Args::new(decoded).and(codes.arg(self)).and(metadata.batch(self, 0, true)).ints(sizes);
        let launch = Launch::grid(DECODERS, shape.kv_heads, batch.sequences.len(), THREADS);
        self.launch("kv_decode_int8", launch, &args)?;
        Ok(decoded)
    }
}

impl CudaKvCache {
    /// Where keys and values are, if they are kept as they are computed with.
    pub(super) fn kept_addresses(&self, gpu: &Cuda) -> Option<[u64; 2]> {
        match &self.kept {
            Kept::Real(real) => Some(real.addresses(gpu)),
            Kept::Codes(_) => None,
        }
    }
}

impl Real {
    pub fn addresses(&self, gpu: &Cuda) -> [u64; 2] {
        [gpu.address(&self.k), gpu.address(&self.v)]
    }
}

impl Codes {
    pub fn arg(&self, gpu: &Cuda) -> Arg {
        Arg::Codes([&self.k, &self.v, &self.k_scales, &self.v_scales].map(|part| gpu.address(part)))
    }
}
