use std::ops::Range;

use super::cuda_cache::CudaKvCache;
use super::{Attention, AttentionShape, KvShape, check};
use crate::cuda::{Args, BatchMetadata, Cuda, CudaOrder, CudaTensor, Launch};
use crate::{Batch, Device, Dtype, Error, Result, Rope, RopeShape, SequenceRows};

pub(crate) const SOURCE: &str = include_str!("attention.cu");
pub(crate) const DECODE_SOURCE: &str = include_str!("decode.cu");

/// Of a kernel on the tensor cores: query rows of a block, rows in its shared memory, and threads.
struct Tile {
    queries: usize,
    rows: usize,
    threads: u32,
}

const TILE: Tile = Tile { queries: 128, rows: 128 + 2 * 64, threads: 256 };

/// The same of heads wider than 128.
const WIDE_TILE: Tile = Tile { queries: 64, rows: 64 + 4 * 32, threads: 128 };

/// The padding of a row, as in the kernel.
const PAD: usize = 8;

/// The plain kernel's query rows, a warp each; key rows of its tile; and the widest head that it takes.
const PLAIN_ROWS: usize = 8;
const PLAIN_TILE: usize = 32;
const PLAIN_HEAD: usize = 256;

/// Keys that one block of the decoding kernel takes, its threads, and the widest head.
const SPLIT: usize = 512;
const DECODE_THREADS: u32 = 256;
const DECODE_HEAD: usize = 256;

impl Attention for Cuda {
    type KvCache = CudaKvCache;

    fn kv_caches(&self, layers: usize, shape: KvShape) -> Result<Vec<CudaKvCache>> {
        self.new_caches(layers, shape)
    }

    fn attention(
        &self,
        [q, k, v]: &[CudaTensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut CudaKvCache>,
    ) -> Result<CudaTensor> {
        let dims = [self.shape(q), self.shape(k), self.shape(v)];
        check(dims, batch, shape, cache.as_ref().map(|cache| &cache.shape))?;
        let metadata = self.metadata(batch)?;
        let cache_rows = cache.as_ref().map(|cache| cache.shape.rows());
        let [keys, values] = match cache {
            Some(cache) => self.append(cache, [k, v], (batch, &metadata), shape)?,
            None => [self.real(k)?, self.real(v)?],
        };
        self.attend(q, [keys, values], (batch, &metadata), shape, (cache_rows, None))
    }

    fn rope_attention(
        &self,
        qkv: &CudaTensor,
        batch: &Batch,
        rope: &RopeShape<CudaTensor>,
        shape: &AttentionShape,
        cache: Option<&mut CudaKvCache>,
        order: Option<&CudaOrder>,
    ) -> Result<CudaTensor> {
        // Its blocks see one head each, and a norm of all heads together must see all.
        let by_head = rope.whole_norms(self) == [false; 2];
        let step = cache.as_ref().filter(|_| by_head).and_then(|cache| {
            let dtype = cache.shape.dtype;
            self.step_kernel(&batch.sequences, (rope, shape), dtype)
        });
        let y = match (cache, step) {
            (Some(cache), Some(kernel)) => {
                return self.attention_step(kernel, Product { qkv, rope, cache }, batch, shape, order);
            }
            (Some(cache), None) => match cache.kept_addresses(self) {
                // Keys and values go where they stay.
                Some(kept) => {
                    let (rows, metadata) = (cache.shape.rows(), self.metadata(batch)?);
                    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
                    let dims = [wide, narrow, narrow].map(|width| (batch.rows(), width));
                    check(dims, batch, shape, Some(&cache.shape))?;
                    let q = self.rope_into(qkv, batch, rope, kept, metadata.slots(self))?;
                    let product = by_head.then_some(Product { qkv, rope, cache });
                    self.attend(&q, kept, (batch, &metadata), shape, (Some(rows), product))?
                }
                None => self.attention(&self.rope(qkv, batch, rope)?, batch, shape, Some(cache))?,
            },
            (None, _) => self.attention(&self.rope(qkv, batch, rope)?, batch, shape, None)?,
        };
        self.in_order(&y, order)
    }
}

/// Blocks that share the keys of one sequence when each has one new token.
pub(crate) fn splits(sequences: &[SequenceRows]) -> usize {
    sequences.iter().map(|s| s.context + 1).max().unwrap_or(0).div_ceil(SPLIT)
}

/// What attention is made from where one kernel does it all.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// q|k|v of every token, not yet turned.
    pub qkv: &'a CudaTensor,
    pub rope: &'a RopeShape<CudaTensor>,
    pub cache: &'a CudaKvCache,
}

/// What is attended to, and where the result goes.
pub(super) struct Call<'a> {
    pub y: &'a CudaTensor,
    pub q: &'a CudaTensor,
    /// Addresses of the cache's rows, or of the batch's own.
    pub keys: u64,
    pub values: u64,
    /// Rows of the cache, where there is one.
    pub cache_rows: Option<usize>,
    pub batch: &'a Batch,
    pub metadata: &'a BatchMetadata,
    pub shape: &'a AttentionShape,
    pub product: Option<Product<'a>>,
}

/// Neighbouring sequences of a batch.
pub(super) struct Part {
    pub sequences: Range<usize>,
    /// The first one's first row.
    pub row: usize,
}

impl Tile {
    /// Shared memory of a block.
    fn bytes(&self, head_dim: usize) -> usize {
        2 * (head_dim + PAD) * self.rows
    }
}

impl Cuda {
    /// The kernel on the tensor cores; the plain one serves where there is none.
    fn tensor_core_kernel(&self, head_dim: usize) -> Option<(&'static str, Tile)> {
        let (kernel, tile) = match head_dim {
            16 => ("attention_16", TILE),
            32 => ("attention_32", TILE),
            64 => ("attention_64", TILE),
            96 => ("attention_96", TILE),
            128 => ("attention_128", TILE),
            256 => ("attention_256", WIDE_TILE),
            _ => return None,
        };
        let fits = self.dtype() != Dtype::F32 && tile.bytes(head_dim) <= self.shared_memory();
        fits.then_some((kernel, tile))
    }

    /// Attention of `q` to keys and values at two addresses: the batch's own, or a cache's, which has them already.
    fn attend(
        &self,
        q: &CudaTensor,
        [keys, values]: [u64; 2],
        (batch, metadata): (&Batch, &BatchMetadata),
        shape: &AttentionShape,
        (cache_rows, product): (Option<usize>, Option<Product>),
    ) -> Result<CudaTensor> {
        let y = self.new_tensor(self.shape(q))?;
        let call = Call { y: &y, q, keys, values, cache_rows, batch, metadata, shape, product };
        let single =
            cache_rows.is_some() && shape.head_dim <= DECODE_HEAD && shape.head_dim.is_multiple_of(8);
        let is_single = |s: &SequenceRows| single && s.rows == 1;
        // Prompts and sequences that go on can share a step: each have a kernel for their kind.
        let (mut sequence, mut row) = (0, 0);
        for run in batch.sequences.chunk_by(|a, b| is_single(a) == is_single(b)) {
            let part = Part { sequences: sequence..sequence + run.len(), row };
            match is_single(&run[0]) {
                true => self.attend_one_each(&call, part)?,
                false => self.attend_many(&call, part)?,
            }
            sequence += run.len();
            row += run.iter().map(|s| s.rows).sum::<usize>();
        }
        Ok(y)
    }

    /// One new token a sequence, by the kernel of a step where there is one: it turns these tokens' heads again.
    fn attend_one_each(&self, call: &Call, part: Part) -> Result<()> {
        if let Some(product) = call.product {
            let sequences = &call.batch.sequences[part.sequences.clone()];
            let dtype = product.cache.shape.dtype;
            if let Some(kernel) = self.step_kernel(sequences, (product.rope, call.shape), dtype) {
                return self.step_of_part(kernel, product, call, &part);
            }
        }
        let AttentionShape { heads, head_dim: head, .. } = *call.shape;
        let count = part.sequences.len();
        let splits = splits(&call.batch.sequences[part.sequences.clone()]);
        self.depends_on_contexts();
        let parts = self.scratch(if splits > 1 { 4 * count * heads * splits * (head + 2) } else { 0 })?;
        let first = (part.row * heads * head * self.dtype().size()) as u64;
        let args = Args::new([self.real(call.y)? + first, self.arrived(&parts)?, self.real(call.q)? + first])
            .addresses([call.keys, call.values])
            .and(call.metadata.batch(self, part.sequences.start, true))
            .ints([heads, call.shape.kv_heads, call.shape.window.unwrap_or(0)])
            .floats([call.shape.scale, call.shape.soft_cap.unwrap_or(0.0)])
            .ints([head]);
        let per_read = 16 / self.dtype().size();
        let shared = 4 * (head + 2 * SPLIT + DECODE_THREADS as usize * per_read);
        let launch = Launch::grid(heads, splits, count, DECODE_THREADS).shared(shared);
        self.launch("attention_decode", launch, &args)?;
        if splits > 1 {
            let args = Args::new([self.real(call.y)? + first, self.arrived(&parts)?]).ints([splits, head]);
            self.launch("attention_join", Launch::blocks(count * heads, 128), &args)?;
        }
        Ok(())
    }

    /// Any number of new tokens a sequence.
    fn attend_many(&self, call: &Call, part: Part) -> Result<()> {
        if let Some(kernel) = self.hopper_kernel(call, &part) {
            return self.attend_on_hopper(kernel, call, &part);
        }
        let (shape, sequences) = (call.shape, &call.batch.sequences[part.sequences.clone()]);
        let args = Args::new([self.real(call.y)?, self.real(call.q)?, call.keys, call.values])
            .and(call.metadata.batch(self, part.sequences.start, call.cache_rows.is_some()))
            .ints([shape.heads, shape.kv_heads, shape.window.unwrap_or(0)])
            .floats([shape.scale, shape.soft_cap.unwrap_or(0.0)]);
        let longest = sequences.iter().map(|s| s.rows).max().unwrap_or(0);
        let grid = |rows: usize, threads| {
            Launch::grid(longest.div_ceil(rows), shape.heads, sequences.len(), threads)
        };
        let head = shape.head_dim;
        match self.tensor_core_kernel(head) {
            Some((kernel, tile)) => {
                self.launch(kernel, grid(tile.queries, tile.threads).shared(tile.bytes(head)), &args)
            }
            None if head <= PLAIN_HEAD => {
                let shared = 4 * (PLAIN_TILE * (2 * head + 1) + PLAIN_ROWS * head);
                let launch = grid(PLAIN_ROWS, 32 * PLAIN_ROWS as u32).shared(shared);
                self.launch("attention_plain", launch, &args.ints([head]))
            }
            None => Err(Error::shape("attention head_dim on CUDA", format!("at most {PLAIN_HEAD}"), head)),
        }
    }
}
