//! Attention of many tokens: a tile of queries stands in the columns of blocks, keys and features of values in their rows.
//! Scores of a key are next to one another, so that softmax goes through all queries of a tile at once.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use bytemuck::Zeroable;

use super::AttentionShape;
use super::cpu_strips::Strips;
use crate::cpu::block::{Before, COLUMNS, Columns, LANES, ROWS, multiply_block};
use crate::cpu::{Isa, Parts, exp_columns, scale_columns, soft_cap};

/// Queries of a tile.
pub(super) const TILE: usize = COLUMNS;

/// Tokens whose values are summed up, one after the other, before they are added: as many as in faer's products.
const DEPTH: usize = 512;

/// Some queries of a sequence: their rows in q and y, and the position of the first.
pub(super) struct Tile<'a> {
    pub first: usize,
    pub rows: usize,
    pub position: usize,
    pub strips: &'a Strips,
}

thread_local! {
    /// Memory that a thread uses again and again.
    static SCRATCH: RefCell<[Vec<Columns>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

impl Tile<'_> {
    /// Writes the outputs of one head into y, which is like q.
    pub fn head(&self, q: &[f32], head: usize, shape: &AttentionShape, y: &Parts<MaybeUninit<f32>>) {
        let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
        let kv_head = head / (shape.heads / shape.kv_heads);
        let columns = self.rows.next_multiple_of(LANES);
        let (start, isa) = (self.strips.seen.start, Isa::best());
        // The strips that hold what the tile sees, which may begin before it.
        let strips =
            (self.first_seen(0, shape) - start) / ROWS..(self.position + self.rows - start).div_ceil(ROWS);
        let keys = strips.start * ROWS..self.position + self.rows - start;
        SCRATCH.with_borrow_mut(|[queries, scores, outputs]| {
            queries.clear();
            queries.resize(d, Columns::zeroed());
            for r in 0..self.rows {
                let q = &q[(self.first + r) * width + head * d..][..d];
                queries.iter_mut().zip(q).for_each(|(queries, q)| queries[r] = q * shape.scale);
            }
            // All of them are written.
            scores.resize((strips.len() * ROWS).max(scores.len()), Columns::zeroed());
            let places = scores.chunks_exact_mut(ROWS);
            for (keys, scores) in self.strips.keys(kv_head).skip(strips.start).zip(places).take(strips.len())
            {
                let scores = (bytemuck::cast_slice_mut(scores), COLUMNS);
                multiply_block((keys, 0), queries, columns, scores, Before::Dropped, isa);
            }
            let scores = &mut scores[..keys.len()];
            self.softmax(scores, keys.start + start, columns, shape);
            outputs.clear();
            outputs.resize(d.next_multiple_of(ROWS), Columns::zeroed());
            for (scores, first) in scores.chunks(DEPTH).zip(keys.step_by(DEPTH)) {
                for (values, outputs) in self.strips.values(kv_head).zip(outputs.chunks_exact_mut(ROWS)) {
                    let values = (&values[first..][..scores.len()], 0);
                    let outputs = (bytemuck::cast_slice_mut(outputs), COLUMNS);
                    multiply_block(values, scores, columns, outputs, Before::Added, isa);
                }
            }
            for r in 0..self.rows {
                // SAFETY: every tile has rows of its own in y, and every head columns.
                let y = unsafe { y.part((self.first + r) * width + head * d, d) };
                y.iter_mut().zip(&*outputs).for_each(|(y, outputs)| {
                    y.write(outputs[r]);
                });
            }
        });
    }

    /// Scores of the tokens from `first` on become weights; what a query does not see weighs nothing.
    fn softmax(&self, scores: &mut [Columns], first: usize, columns: usize, shape: &AttentionShape) {
        if let Some(cap) = shape.soft_cap {
            soft_cap(bytemuck::cast_slice_mut(scores), cap);
        }
        let seen_by_all = self.first_seen(columns, shape)..self.position + 1;
        for (token, scores) in (first..).zip(&mut *scores).filter(|(token, _)| !seen_by_all.contains(token)) {
            for (r, score) in scores.iter_mut().enumerate() {
                if token > self.position + r || token < self.first_seen(r, shape) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let mut factors = [0.0; COLUMNS];
        for (column, factors) in (0..columns).step_by(LANES).zip(factors.chunks_exact_mut(LANES)) {
            let seen = |lane| self.position + column + lane + 1 - first;
            let sums = exp_columns(scores, column, std::array::from_fn(|lane| seen(lane) / LANES * LANES));
            factors.iter_mut().zip(sums).for_each(|(factor, sum)| *factor = 1.0 / sum);
        }
        scale_columns(scores, &factors[..columns]);
    }

    /// The first token that row `row` of the tile sees.
    fn first_seen(&self, row: usize, shape: &AttentionShape) -> usize {
        shape.window.map_or(0, |w| (self.position + row + 1).saturating_sub(w))
    }
}
