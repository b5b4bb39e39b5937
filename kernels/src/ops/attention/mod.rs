//! Causal self-attention over a ragged batch, with or without a paged KV cache (Vaswani et al. 2017;
//! grouped queries: Ainslie et al. 2023; sliding window: Jiang et al. 2023).

mod cpu;
mod cpu_cache;
mod cpu_step;
mod cpu_strips;
mod cpu_tile;
pub(crate) mod cuda;
pub(crate) mod cuda_cache;
pub(crate) mod hopper;
mod kv_cache;
pub(crate) mod step;
#[cfg(test)]
mod tests;

use crate::batch::KV_BLOCK_ROWS;
use crate::error::expect;
use crate::ops::scale::check_cap;
use crate::{Batch, Error, Result, Rope, RopeShape};
pub use kv_cache::{KvDtype, KvShape};

/// The heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads / kv_heads` query heads share one.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// What scores are multiplied by: `1 / sqrt(head_dim)`, where a model asks for nothing else.
    pub scale: f32,
    /// What they are then held below: a score becomes `cap tanh(score / cap)` (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Every token sees all before it, scores are those of the paper.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            window: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: None,
        }
    }
}

/// `y[t, h] = sum_s softmax_s(scale q[t, h] . k[s, h']) v[s, h']` over the tokens `s <= t` of t's
/// own sequence, `h' = h / (heads / kv_heads)`; scores are held below a cap first, where there is one.
/// q: `[tokens, heads head_dim]`, k, v: `[tokens, kv_heads head_dim]`, result: like q
pub trait Attention: Rope {
    /// Keys and values of one layer, in blocks of [`KV_BLOCK_ROWS`] rows.
    type KvCache: Send;

    /// Empty caches, one for each of `layers` layers: what they need in common exists once. An error where the heads
    /// do not fit the type of the numbers, or where there is no memory.
    fn kv_caches(&self, layers: usize, shape: KvShape) -> Result<Vec<Self::KvCache>>;

    /// Attends; with a cache, first appends k and v to each sequence's blocks, then sees them and what was
    /// there before, all of it as the cache keeps it. Without one every sequence must start at context 0.
    fn attention(
        &self,
        qkv: &[Self::Tensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut Self::KvCache>,
    ) -> Result<Self::Tensor>;

    /// [`Rope::rope`], then [`Self::attention`]; the result may come in the order that the next weight wants.
    /// qkv: `[tokens, (heads + 2 kv_heads) head_dim]`
    fn rope_attention(
        &self,
        qkv: &Self::Tensor,
        batch: &Batch,
        rope: &RopeShape<Self::Tensor>,
        shape: &AttentionShape,
        cache: Option<&mut Self::KvCache>,
        _order: Option<&Self::Order>,
    ) -> Result<Self::Tensor> {
        self.attention(&self.rope(qkv, batch, rope)?, batch, shape, cache)
    }
}

/// Widths and rows must fit the batch, heads the cache; blocks must exist for every token that is seen.
pub(crate) fn check(
    dims: [(usize, usize); 3],
    batch: &Batch,
    shape: &AttentionShape,
    cache: Option<&KvShape>,
) -> Result<()> {
    let (rows, d) = (batch.rows(), shape.head_dim);
    let kv = (rows, shape.kv_heads * d);
    expect("attention", [(rows, shape.heads * d), kv, kv], dims)?;
    if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(Error::shape(
            "attention heads",
            "a multiple of the kv heads",
            (shape.heads, shape.kv_heads),
        ));
    }
    check_cap(shape.soft_cap)?;
    let cached = cache.map_or((shape.kv_heads, d), |cache| (cache.kv_heads, cache.head_dim));
    expect("attention KV cache heads", (shape.kv_heads, d), cached)?;
    for sequence in &batch.sequences {
        let length = sequence.context + sequence.rows;
        let Some(KvShape { blocks, .. }) = cache else {
            if sequence.context > 0 {
                return Err(Error::shape("attention without a cache", "context 0", sequence.context));
            }
            continue;
        };
        if sequence.blocks.len() * KV_BLOCK_ROWS < length {
            return Err(Error::shape(
                "attention blocks",
                length.div_ceil(KV_BLOCK_ROWS),
                sequence.blocks.len(),
            ));
        }
        if let Some(block) = sequence.blocks.iter().find(|&&b| b as usize >= *blocks) {
            return Err(Error::shape("attention block", format!("below {blocks}"), block));
        }
    }
    Ok(())
}
