//! Keys and values of a sequence in the order in which blocks read them.

use std::ops::Range;

use super::AttentionShape;
use super::cpu_cache::{Part, Rows, Run, parts};
use crate::cpu::block::ROWS;
use crate::cpu::new_rows;

/// What queries of one sequence see.
pub(super) struct Strips {
    /// Of the sequence's tokens.
    pub seen: Range<usize>,
    head_dim: usize,
    /// `[kv_heads, tokens / ROWS, head_dim]`, what is missing from a head's last being zeros.
    keys: Vec<[f32; ROWS]>,
    /// `[kv_heads, head_dim / ROWS, tokens]`, likewise.
    values: Vec<[f32; ROWS]>,
}

impl Strips {
    pub fn of([k, v]: [Rows; 2], runs: &[Run], seen: Range<usize>, shape: &AttentionShape) -> Self {
        let (d, heads, tokens) = (shape.head_dim, shape.kv_heads, seen.len());
        let keys = new_rows(heads, tokens.div_ceil(ROWS) * d, |head, strips: &mut [[f32; ROWS]]| {
            let mut unpacked = Vec::new();
            let parts = parts(k, runs, &seen, (head, heads, d), &mut unpacked);
            let keys: Vec<_> = parts.iter().flat_map(Part::iter).collect();
            for (strip, keys) in strips.chunks_exact_mut(d).zip(keys.chunks(ROWS)) {
                for (i, row) in strip.iter_mut().enumerate() {
                    row.iter_mut().zip(keys).for_each(|(x, key)| *x = key[i]);
                }
            }
        });
        let values = new_rows(heads, d.div_ceil(ROWS) * tokens, |head, strips: &mut [[f32; ROWS]]| {
            let mut unpacked = Vec::new();
            let parts = parts(v, runs, &seen, (head, heads, d), &mut unpacked);
            for (i, value) in parts.iter().flat_map(Part::iter).enumerate() {
                let (whole, rest) = value.as_chunks::<ROWS>();
                let mut rows = strips[i..].iter_mut().step_by(tokens);
                whole.iter().zip(rows.by_ref()).for_each(|(x, row)| *row = *x);
                rest.chunks(ROWS).zip(rows).for_each(|(x, row)| row[..x.len()].copy_from_slice(x));
            }
        });
        Self { seen, head_dim: d, keys, values }
    }

    /// Those of one head, each the keys of [`ROWS`] tokens: `[head_dim]`.
    pub fn keys(&self, kv_head: usize) -> impl Iterator<Item = &[[f32; ROWS]]> {
        let count = self.seen.len().div_ceil(ROWS);
        self.keys[kv_head * count * self.head_dim..].chunks_exact(self.head_dim).take(count)
    }

    /// Those of one head, each [`ROWS`] features of all values: `[tokens]`.
    pub fn values(&self, kv_head: usize) -> impl Iterator<Item = &[[f32; ROWS]]> {
        let (count, tokens) = (self.head_dim.div_ceil(ROWS), self.seen.len());
        self.values[kv_head * count * tokens..].chunks_exact(tokens).take(count)
    }
}
