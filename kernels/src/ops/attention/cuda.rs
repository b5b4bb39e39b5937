use cudarc::driver::CudaSlice;

use super::{Attention, AttentionShape, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{Batch, Device, Error, KV_BLOCK_ROWS, Result};

pub(crate) const SOURCE: &str = include_str!("attention.cu");

/// Query rows of a block, key rows of a tile, threads, and the padding of a row: as in the kernel.
const TILE_Q: usize = 128;
const TILE_KV: usize = 64;
const THREADS: u32 = 256;
const PAD: usize = 8;

/// Keys and values of one layer, `[blocks * KV_BLOCK_ROWS, kv_width]` each.
pub struct CudaKvCache {
    k: CudaSlice<u16>,
    v: CudaSlice<u16>,
    blocks: usize,
}

/// The batch's description on the card.
struct BatchOnCard {
    first_row: CudaSlice<u32>,
    rows: CudaSlice<u32>,
    context: CudaSlice<u32>,
    table: Option<CudaSlice<u32>>,
    table_start: CudaSlice<u32>,
}

impl Attention for Cuda {
    type KvCache = CudaKvCache;

    fn kv_cache(&self, blocks: usize, kv_width: usize) -> Result<CudaKvCache> {
        let length = blocks * KV_BLOCK_ROWS * kv_width;
        Ok(CudaKvCache { k: self.zeros(length)?, v: self.zeros(length)?, blocks })
    }

    fn attention(
        &self,
        [q, k, v]: &[CudaTensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut CudaKvCache>,
    ) -> Result<CudaTensor> {
        let dims = [self.shape(q), self.shape(k), self.shape(v)];
        check(dims, batch, shape, cache.as_ref().map(|cache| cache.blocks))?;
        let kernel = kernel(shape.head_dim)?;
        let on_card = self.batch_on_card(batch, cache.is_some())?;
        let (keys, values) = match cache {
            Some(cache) => {
                self.append(cache, [k, v], batch)?;
                (self.address(&cache.k), self.address(&cache.v))
            }
            None => (self.half(k)?, self.half(v)?),
        };
        let y = self.new_tensor(dims[0])?;
        let longest = batch.sequences.iter().map(|s| s.rows).max().unwrap_or(0);
        let grid = Launch::grid(longest.div_ceil(TILE_Q), shape.heads, batch.sequences.len(), THREADS);
        let row = shape.head_dim + PAD;
        let args = [
            Arg::Address(self.half(&y)?),
            Arg::Address(self.half(q)?),
            Arg::Address(keys),
            Arg::Address(values),
            Arg::Batch([
                self.address(&on_card.first_row),
                self.address(&on_card.rows),
                self.address(&on_card.context),
                on_card.table.as_ref().map_or(0, |table| self.address(table)),
                self.address(&on_card.table_start),
            ]),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.window.map_or(0, |window| window as i32)),
            Arg::Float(1.0 / (shape.head_dim as f32).sqrt()),
        ];
        self.launch(kernel, grid.shared(2 * row * (TILE_Q + 4 * TILE_KV)), &args)?;
        Ok(y)
    }
}

fn kernel(head_dim: usize) -> Result<&'static str> {
    Ok(match head_dim {
        16 => "attention_16",
        32 => "attention_32",
        64 => "attention_64",
        96 => "attention_96",
        128 => "attention_128",
        _ => return Err(Error::shape("attention head_dim on CUDA", "16, 32, 64, 96 or 128", head_dim)),
    })
}

impl Cuda {
    fn append(&self, cache: &mut CudaKvCache, [k, v]: [&CudaTensor; 2], batch: &Batch) -> Result<()> {
        let slot = |blocks: &[u32], position: usize| {
            blocks[position / KV_BLOCK_ROWS] * KV_BLOCK_ROWS as u32 + (position % KV_BLOCK_ROWS) as u32
        };
        let slots: Vec<u32> = batch
            .sequences
            .iter()
            .flat_map(|s| (s.context..s.context + s.rows).map(move |position| slot(&s.blocks, position)))
            .collect();
        let slots = self.upload(&slots)?;
        let (rows, width) = self.shape(k);
        let args = [
            Arg::Address(self.address(&cache.k)),
            Arg::Address(self.address(&cache.v)),
            Arg::Address(self.half(k)?),
            Arg::Address(self.half(v)?),
            Arg::Address(self.address(&slots)),
            Arg::Int(width as i32),
        ];
        self.launch("kv_append", Launch::blocks(rows, 256), &args)
    }

    fn batch_on_card(&self, batch: &Batch, paged: bool) -> Result<BatchOnCard> {
        let numbers = |f: &dyn Fn(&crate::SequenceRows) -> usize| -> Vec<u32> {
            batch.sequences.iter().map(|s| f(s) as u32).collect()
        };
        let starts = |lengths: &[u32]| -> Vec<u32> {
            lengths.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect()
        };
        let rows = numbers(&|s| s.rows);
        let blocks = numbers(&|s| s.blocks.len());
        let table: Vec<u32> = batch.sequences.iter().flat_map(|s| s.blocks.iter().copied()).collect();
        Ok(BatchOnCard {
            first_row: self.upload(&starts(&rows))?,
            rows: self.upload(&rows)?,
            context: self.upload(&numbers(&|s| s.context))?,
            table: if paged { Some(self.upload(&table)?) } else { None },
            table_start: self.upload(&starts(&blocks))?,
        })
    }
}
