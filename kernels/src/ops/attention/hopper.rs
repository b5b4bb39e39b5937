//! Attention of prompts on Hopper: blocks that go from one tile of queries to the next.

use super::cuda::{Call, Part};
use crate::cuda::{Args, Cuda, Launch, Rows};
use crate::{Dtype, KV_BLOCK_ROWS, Result};

pub(crate) const SOURCE: &str = include_str!("hopper.cu");
pub(crate) const COPY_SOURCE: &str = include_str!("hopper_copy.cu");

/// Query rows of a tile, of which a sequence needs half before the kernel pays; and a block's threads: as in the kernel.
const ROWS: usize = 128;
const THREADS: u32 = 384;

/// Bytes of a tile's 64 features, tiles of a block, and what aligning them may cost.
const PANEL: usize = 128 * 128;
const TILES: usize = 6;
const ALIGNMENT: usize = 1024;

/// Half of the cache of an H100 or H200: keys and values of heads that are gone through together should stay in it.
const CACHE: usize = 24 << 20;

fn kernel(head_dim: usize) -> Option<&'static str> {
    match head_dim {
        64 => Some("attention_hopper_64"),
        128 => Some("attention_hopper_128"),
        _ => None,
    }
}

impl Cuda {
    /// The kernel, where there is one for these sequences. It knows no caps.
    pub(super) fn hopper_kernel(&self, call: &Call, part: &Part) -> Option<&'static str> {
        let longest = call.batch.sequences[part.sequences.clone()].iter().map(|s| s.rows).max()?;
        let possible = self.is_hopper() && self.dtype() != Dtype::F32 && call.shape.soft_cap.is_none();
        kernel(call.shape.head_dim).filter(|_| possible && longest >= ROWS / 2)
    }

    pub(super) fn attend_on_hopper(&self, kernel: &'static str, call: &Call, part: &Part) -> Result<()> {
        let (shape, sequences) = (call.shape, &call.batch.sequences[part.sequences.clone()]);
        let (head, queries) = (shape.head_dim, call.batch.rows());
        let keys = call.cache_rows.unwrap_or(queries);
        let of_keys = Rows { rows: keys, heads: shape.kv_heads, head_dim: head };
        let of_queries = Rows { rows: queries, heads: shape.heads, head_dim: head };
        let tiles = sequences.iter().map(|s| s.rows.div_ceil(ROWS)).max().unwrap_or(0);
        let longest = sequences.iter().map(|s| s.context + s.rows).max().unwrap_or(0);
        // Heads that share keys and values go together in any case.
        let shared = shape.heads / shape.kv_heads;
        let together = CACHE / (2 * longest * head * self.dtype().size()).max(1) * shared;
        let blocks = (sequences.len() * shape.heads * tiles).min(self.multiprocessors());
        let args = Args::new([self.real(call.y)?])
            .and(self.tensor_map(self.real(call.q)?, of_queries, KV_BLOCK_ROWS)?)
            .and(self.tensor_map(call.keys, of_keys, KV_BLOCK_ROWS)?)
            .and(self.tensor_map(call.values, of_keys, KV_BLOCK_ROWS)?)
            .and(call.metadata.batch(self, part.sequences.start, call.cache_rows.is_some()))
            .ints([shape.heads, shape.kv_heads, shape.window.unwrap_or(0)])
            .floats([shape.scale])
            .ints([tiles, sequences.len(), together.clamp(shared, shape.heads)]);
        let launch = Launch::blocks(blocks, THREADS).shared(ALIGNMENT + TILES * head / 64 * PANEL);
        self.launch(kernel, launch, &args)
    }
}
