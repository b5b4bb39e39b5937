use std::ops::Range;

use candle_core::Tensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::{Attention, AttentionShape, check};
use crate::cpu::{View, exp_in_place, maximum};
use crate::{Batch, Cpu, Device, KV_BLOCK_ROWS, Result, SequenceRows};

/// Query rows that share one score tile: long enough for the blocked product, short enough for the cache.
const TILE_ROWS: usize = 64;

/// Keys and values of one layer, `[blocks * KV_BLOCK_ROWS, kv_width]` each.
pub struct CpuKvCache {
    k: Vec<f32>,
    v: Vec<f32>,
    width: usize,
}

impl Attention for Cpu {
    type KvCache = CpuKvCache;

    fn kv_cache(&self, blocks: usize, kv_width: usize) -> Result<CpuKvCache> {
        let length = blocks * KV_BLOCK_ROWS * kv_width;
        Ok(CpuKvCache { k: vec![0.0; length], v: vec![0.0; length], width: kv_width })
    }

    fn attention(
        &self,
        [q, k, v]: &[Tensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut CpuKvCache>,
    ) -> Result<Tensor> {
        let dims = [self.shape(q), self.shape(k), self.shape(v)];
        let blocks = cache.as_ref().map(|c| c.k.len() / (c.width * KV_BLOCK_ROWS).max(1));
        check(dims, batch, shape, blocks)?;
        let (q, k, v) = (View::of(q)?, View::of(k)?, View::of(v)?);
        let y = match cache {
            Some(cache) => {
                cache.append(&k, &v, batch);
                attend(&q, &cache.k, &cache.v, batch, shape, true)
            }
            None => attend(&q, &k, &v, batch, shape, false),
        };
        self.tensor(y, dims[0])
    }
}

impl CpuKvCache {
    fn append(&mut self, k: &[f32], v: &[f32], batch: &Batch) {
        let width = self.width;
        let mut row = 0;
        for sequence in &batch.sequences {
            for position in sequence.context..sequence.context + sequence.rows {
                let slot = sequence.blocks[position / KV_BLOCK_ROWS] as usize * KV_BLOCK_ROWS
                    + position % KV_BLOCK_ROWS;
                self.k[slot * width..][..width].copy_from_slice(&k[row * width..][..width]);
                self.v[slot * width..][..width].copy_from_slice(&v[row * width..][..width]);
                row += 1;
            }
        }
    }
}

/// Consecutive tokens of a sequence whose keys lie in consecutive rows.
struct Run {
    tokens: Range<usize>,
    row: usize,
}

/// Where the keys of a sequence's tokens lie: one run without a cache, else its blocks, neighbours joined.
fn runs(sequence: &SequenceRows, first_row: usize, paged: bool) -> Vec<Run> {
    let length = sequence.context + sequence.rows;
    if !paged {
        return vec![Run { tokens: 0..length, row: first_row }];
    }
    let mut runs: Vec<Run> = Vec::new();
    for (start, block) in (0..length).step_by(KV_BLOCK_ROWS).zip(&sequence.blocks) {
        let (end, row) = ((start + KV_BLOCK_ROWS).min(length), *block as usize * KV_BLOCK_ROWS);
        match runs.last_mut() {
            Some(last) if last.row + last.tokens.len() == row => last.tokens.end = end,
            _ => runs.push(Run { tokens: start..end, row }),
        }
    }
    runs
}

/// One tile of a sequence's queries: its rows in q and the position of the first.
struct Tile<'a> {
    q: &'a [f32],
    position: usize,
    runs: &'a [Run],
}

fn attend(q: &[f32], k: &[f32], v: &[f32], batch: &Batch, shape: &AttentionShape, paged: bool) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let starts = batch.sequences.iter().scan(0, |next, s| Some(std::mem::replace(next, *next + s.rows)));
    let keys: Vec<_> =
        batch.sequences.iter().zip(starts.clone()).map(|(s, row)| runs(s, row, paged)).collect();
    let mut tiles = Vec::new();
    let mut y = vec![0.0; q.len()];
    let mut rest = &mut y[..];
    for ((sequence, start), runs) in batch.sequences.iter().zip(starts).zip(&keys) {
        for row in (0..sequence.rows).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(sequence.rows - row);
            let q = &q[(start + row) * width..][..rows * width];
            let (out, after) = rest.split_at_mut(rows * width);
            rest = after;
            tiles.push((Tile { q, position: sequence.context + row, runs }, out));
        }
    }
    tiles.into_par_iter().for_each(|(tile, out)| {
        let heads =
            (0..shape.heads).into_par_iter().map(|head| tile.head(k, v, shape, head)).collect::<Vec<_>>();
        for (head, values) in heads.iter().enumerate() {
            let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
            for (row, values) in out.chunks_exact_mut(width).zip(values.chunks_exact(shape.head_dim)) {
                row[columns.clone()].copy_from_slice(values);
            }
        }
    });
    y
}

impl Tile<'_> {
    /// Output of one head, `[rows, head_dim]`.
    fn head(&self, k: &[f32], v: &[f32], shape: &AttentionShape, head: usize) -> Vec<f32> {
        let d = shape.head_dim;
        let (width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let rows = self.q.len() / width;
        let kv_column = head / (shape.heads / shape.kv_heads) * d;
        let (first, end) = (self.first_seen(0, shape.window), self.position + rows);
        let q = MatRef::from_row_major_slice(self.q, rows, width).subcols(head * d, d);
        let part = |x, run: &Run| {
            let seen = run.tokens.start.max(first)..run.tokens.end.min(end);
            let row = run.row + seen.start.saturating_sub(run.tokens.start);
            let length = seen.end.saturating_sub(seen.start);
            let x: MatRef<'_, f32> = MatRef::from_row_major_slice(x, k.len() / kv_width, kv_width);
            (
                seen.start - first.min(seen.start),
                x.submatrix(if length == 0 { 0 } else { row }, kv_column, length, d),
            )
        };
        let mut scores = vec![0.0; rows * (end - first)];
        for run in self.runs {
            let (column, keys) = part(k, run);
            let scores = MatMut::from_row_major_slice_mut(&mut scores, rows, end - first);
            if keys.nrows() > 0 {
                let scores = scores.subcols_mut(column, keys.nrows());
                matmul(scores, Accum::Replace, q, keys.transpose(), 1.0 / (d as f32).sqrt(), Par::Seq);
            }
        }
        for (r, row) in scores.chunks_exact_mut(end - first).enumerate() {
            let seen = self.first_seen(r, shape.window) - first..self.position + r + 1 - first;
            softmax(row, seen);
        }
        let mut y = vec![0.0; rows * d];
        for run in self.runs {
            let (column, values) = part(v, run);
            if values.nrows() > 0 {
                let scores =
                    MatRef::from_row_major_slice(&scores, rows, end - first).subcols(column, values.nrows());
                matmul(
                    MatMut::from_row_major_slice_mut(&mut y, rows, d),
                    Accum::Add,
                    scores,
                    values,
                    1.0,
                    Par::Seq,
                );
            }
        }
        y
    }

    /// The first token that row `row` of the tile sees.
    fn first_seen(&self, row: usize, window: Option<usize>) -> usize {
        window.map_or(0, |w| (self.position + row + 1).saturating_sub(w))
    }
}

/// Softmax over the scores that are seen; the others become 0.
fn softmax(scores: &mut [f32], seen: Range<usize>) {
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let seen = &mut scores[seen];
    let largest = maximum(seen);
    let factor = 1.0 / exp_in_place(seen, largest);
    seen.iter_mut().for_each(|x| *x *= factor);
}
