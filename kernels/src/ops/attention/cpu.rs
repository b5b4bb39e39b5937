use std::cell::RefCell;
use std::ops::Range;

use candle_core::Tensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::cpu_cache::{CpuKvCache, Part, Rows, Run, parts, runs};
use super::cpu_step::{self, MOST_ROWS, Token};
use super::{Attention, AttentionShape, KvShape, check};
use crate::cpu::{Parts, View, exp_in_place, maximum, soft_cap, team};
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

thread_local! {
    /// Scores of a tile: memory that a thread uses again and again.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One tile of a sequence's queries: its rows in q and y, and the position of the first.
struct Tile<'a> {
    first: usize,
    rows: usize,
    position: usize,
    runs: &'a [Run],
}

fn attend(q: &[f32], kv: [Rows; 2], batch: &Batch, shape: &AttentionShape, paged: bool) -> Vec<f32> {
    let starts = batch.sequences.iter().scan(0, |next, s| Some(std::mem::replace(next, *next + s.rows)));
    let keys: Vec<_> =
        batch.sequences.iter().zip(starts.clone()).map(|(s, row)| runs(s, row, paged)).collect();
    let (mut tiles, mut tokens) = (Vec::new(), Vec::new());
    for ((sequence, start), runs) in batch.sequences.iter().zip(starts).zip(&keys) {
        let context = sequence.context;
        if sequence.rows <= MOST_ROWS {
            tokens.extend((0..sequence.rows).map(|i| Token { row: start + i, position: context + i, runs }));
            continue;
        }
        tiles.extend((0..sequence.rows).step_by(TILE_ROWS).map(|row| {
            let rows = TILE_ROWS.min(sequence.rows - row);
            Tile { first: start + row, rows, position: context + row, runs }
        }));
    }
    // Codes are unpacked once for all heads that share them.
    let together = match kv[0] {
        Rows::Plain(_) => 1,
        Rows::Codes(_) => shape.heads / shape.kv_heads,
    };
    let mut y = vec![0.0; q.len()];
    let (groups, parts) = (shape.heads / together, Parts::of(&mut y));
    team::for_each(tiles.len() * groups, |i| {
        let first = i % groups * together;
        tiles[i / groups].heads(q, kv, shape, first..first + together, &parts);
    });
    cpu_step::attend(q, kv, &tokens, shape, &mut y);
    y
}

impl Tile<'_> {
    /// Outputs of heads that share their keys.
    fn heads(
        &self,
        q: &[f32],
        [k, v]: [Rows; 2],
        shape: &AttentionShape,
        heads: Range<usize>,
        y: &Parts<f32>,
    ) {
        let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
        let kv_head = heads.start / (shape.heads / shape.kv_heads);
        let seen = self.first_seen(0, shape.window)..self.position + self.rows;
        let place = (kv_head, shape.kv_heads, d);
        let (mut unpacked_k, mut unpacked_v) = (Vec::new(), Vec::new());
        let keys = parts(k, self.runs, &seen, place, &mut unpacked_k);
        let values = parts(v, self.runs, &seen, place, &mut unpacked_v);
        let q = MatRef::from_row_major_slice(&q[self.first * width..][..self.rows * width], self.rows, width);
        SCORES.with_borrow_mut(|scores| {
            let needed = self.rows * seen.len();
            scores.resize(needed.max(scores.len()), 0.0);
            for head in heads {
                let first = y.place(self.first * width + head * d, (self.rows - 1) * width + d);
                // SAFETY: every tile has rows of its own in y, and every head columns.
                let y = unsafe { MatMut::from_raw_parts_mut(first, self.rows, d, width as isize, 1) };
                self.head(q.subcols(head * d, d), [&keys, &values], shape, &seen, &mut scores[..needed], y);
            }
        });
    }

    /// Adds the output of one head, `[rows, head_dim]`.
    fn head(
        &self,
        q: MatRef<f32>,
        [keys, values]: [&[Part]; 2],
        shape: &AttentionShape,
        seen: &Range<usize>,
        scores: &mut [f32],
        mut y: MatMut<f32>,
    ) {
        let length = seen.len();
        for keys in keys {
            let scores = MatMut::from_row_major_slice_mut(scores, self.rows, length);
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
        for values in values {
            let scores = MatRef::from_row_major_slice(scores, self.rows, length);
            let scores = scores.subcols(values.before, values.rows);
            matmul(y.as_mut(), Accum::Add, scores, values.matrix(), 1.0, Par::Seq);
        }
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
