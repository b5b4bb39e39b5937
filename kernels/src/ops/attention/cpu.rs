use std::ops::Range;

use candle_core::Tensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::cpu_cache::{CpuKvCache, Part, Rows, Run, parts, runs};
use super::cpu_step::{self, MOST_ROWS, Token};
use super::{Attention, AttentionShape, KvShape, check};
use crate::cpu::{View, exp_in_place, maximum, soft_cap};
use crate::{Batch, Cpu, Device, Result};

/// Query rows that share one score tile: long enough for the blocked product, short enough for the cache.
const TILE_ROWS: usize = 64;

impl Attention for Cpu {
    type KvCache = CpuKvCache;

    fn kv_caches(&self, layers: usize, shape: KvShape) -> Result<Vec<CpuKvCache>> {
        (0..layers).map(|_| CpuKvCache::new(shape)).collect()
    }

    fn attention(
        &self,
        [q, k, v]: &[Tensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut CpuKvCache>,
    ) -> Result<Tensor> {
        let dims = [self.shape(q), self.shape(k), self.shape(v)];
        check(dims, batch, shape, cache.as_ref().map(|cache| &cache.shape))?;
        let (q, k, v) = (View::of(q)?, View::of(k)?, View::of(v)?);
        let y = match cache {
            Some(cache) => {
                cache.append(&k, &v, batch);
                attend(&q, [cache.k.rows(), cache.v.rows()], batch, shape, true)
            }
            None => attend(&q, [Rows::Plain(&k), Rows::Plain(&v)], batch, shape, false),
        };
        self.tensor(y, dims[0])
    }
}

/// One tile of a sequence's queries: its rows in q and the position of the first.
struct Tile<'a> {
    q: &'a [f32],
    position: usize,
    runs: &'a [Run],
}

fn attend(q: &[f32], kv: [Rows; 2], batch: &Batch, shape: &AttentionShape, paged: bool) -> Vec<f32> {
    let width = shape.heads * shape.head_dim;
    let starts = batch.sequences.iter().scan(0, |next, s| Some(std::mem::replace(next, *next + s.rows)));
    let keys: Vec<_> =
        batch.sequences.iter().zip(starts.clone()).map(|(s, row)| runs(s, row, paged)).collect();
    let mut tiles = Vec::new();
    let mut y = vec![0.0; q.len()];
    let mut rest = &mut y[..];
    let mut tokens = Vec::new();
    for ((sequence, start), runs) in batch.sequences.iter().zip(starts).zip(&keys) {
        if sequence.rows <= MOST_ROWS {
            let token = |i| Token { row: start + i, position: sequence.context + i, runs };
            tokens.extend((0..sequence.rows).map(token));
            rest = &mut rest[sequence.rows * width..];
            continue;
        }
        for row in (0..sequence.rows).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(sequence.rows - row);
            let q = &q[(start + row) * width..][..rows * width];
            let (out, after) = rest.split_at_mut(rows * width);
            rest = after;
            tiles.push((Tile { q, position: sequence.context + row, runs }, out));
        }
    }
    // Codes are unpacked once for all heads that share them.
    let together = match kv[0] {
        Rows::Plain(_) => 1,
        Rows::Codes(_) => shape.heads / shape.kv_heads,
    };
    tiles.into_par_iter().for_each(|(tile, out)| {
        let tasks = (0..shape.heads / together).into_par_iter();
        let of = |task| tile.heads(kv, shape, task * together..(task + 1) * together);
        let heads: Vec<_> = tasks.flat_map_iter(of).collect();
        for (head, values) in heads.iter().enumerate() {
            let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
            for (row, values) in out.chunks_exact_mut(width).zip(values.chunks_exact(shape.head_dim)) {
                row[columns.clone()].copy_from_slice(values);
            }
        }
    });
    cpu_step::attend(q, kv, &tokens, shape, &mut y);
    y
}

impl Tile<'_> {
    /// Outputs of heads that share their keys, `[rows, head_dim]` each.
    fn heads(&self, [k, v]: [Rows; 2], shape: &AttentionShape, heads: Range<usize>) -> Vec<Vec<f32>> {
        let rows = self.q.len() / (shape.heads * shape.head_dim);
        let kv_head = heads.start / (shape.heads / shape.kv_heads);
        let seen = self.first_seen(0, shape.window)..self.position + rows;
        let place = (kv_head, shape.kv_heads, shape.head_dim);
        let (mut unpacked_k, mut unpacked_v) = (Vec::new(), Vec::new());
        let keys = parts(k, self.runs, &seen, place, &mut unpacked_k);
        let values = parts(v, self.runs, &seen, place, &mut unpacked_v);
        heads.into_par_iter().map(|head| self.head(&keys, &values, shape, head, &seen)).collect()
    }

    /// Output of one head, `[rows, head_dim]`.
    fn head(
        &self,
        keys: &[Part],
        values: &[Part],
        shape: &AttentionShape,
        head: usize,
        seen: &Range<usize>,
    ) -> Vec<f32> {
        let (d, length) = (shape.head_dim, seen.len());
        let width = shape.heads * d;
        let rows = self.q.len() / width;
        let q = MatRef::from_row_major_slice(self.q, rows, width).subcols(head * d, d);
        let mut scores = vec![0.0; rows * length];
        for keys in keys {
            let scores = MatMut::from_row_major_slice_mut(&mut scores, rows, length);
            let scores = scores.subcols_mut(keys.before, keys.rows);
            matmul(scores, Accum::Replace, q, keys.matrix().transpose(), shape.scale, Par::Seq);
        }
        for (r, row) in scores.chunks_exact_mut(length).enumerate() {
            let own = self.first_seen(r, shape.window) - seen.start..self.position + r + 1 - seen.start;
            if let Some(cap) = shape.soft_cap {
                soft_cap(&mut row[own.clone()], cap);
            }
            softmax(row, own);
        }
        let mut y = vec![0.0; rows * d];
        for values in values {
            let scores = MatRef::from_row_major_slice(&scores, rows, length);
            let scores = scores.subcols(values.before, values.rows);
            let y = MatMut::from_row_major_slice_mut(&mut y, rows, d);
            matmul(y, Accum::Add, scores, values.matrix(), 1.0, Par::Seq);
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
