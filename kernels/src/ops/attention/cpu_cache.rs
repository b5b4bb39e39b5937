//! The CPU's KV cache, and what a head sees of it.

use std::ops::Range;

use super::kv_cache::{KvDtype, KvShape, quantize};
use crate::cpu::widen_codes;
use crate::{Batch, KV_BLOCK_ROWS, Result, SequenceRows};

/// Keys and values of one layer.
pub struct CpuKvCache {
    pub(super) shape: KvShape,
    pub(super) k: Kept,
    pub(super) v: Kept,
}

/// Keys or values: a row for every token that there is room for.
pub(super) enum Kept {
    /// `[blocks * KV_BLOCK_ROWS, kv_heads * head_dim]`
    Plain(Vec<f32>),
    Codes(Codes),
}

/// The same as bytes.
pub(super) struct Codes {
    /// `[blocks * KV_BLOCK_ROWS, kv_heads * head_dim]`
    codes: Vec<i8>,
    /// `[blocks * KV_BLOCK_ROWS, kv_heads]`
    scales: Vec<f32>,
    head_dim: usize,
}

/// Keys or values of a pass, wherever they are.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    Plain(&'a [f32]),
    Codes(&'a Codes),
}

/// Consecutive tokens of a sequence whose keys lie in consecutive rows.
pub(super) struct Run {
    tokens: Range<usize>,
    row: usize,
}

/// Keys or values that a head sees, `[tokens, head_dim]`.
pub(super) struct Part<'a> {
    /// How many it sees before these.
    pub before: usize,
    pub rows: usize,
    pub width: usize,
    values: &'a [f32],
    /// From one row to the next.
    stride: usize,
}

impl<'a> Part<'a> {
    /// Up to `most` of them from row `first` on.
    pub fn some(&self, first: usize, most: usize) -> Part<'a> {
        let rows = most.min(self.rows - first);
        Part { before: self.before + first, rows, values: &self.values[first * self.stride..], ..*self }
    }

    /// Where row `row` begins, which is followed by `width` values.
    #[cfg(target_arch = "x86_64")]
    pub fn place(&self, row: usize) -> *const f32 {
        self.values[row * self.stride..][..self.width].as_ptr()
    }

    /// Row by row.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks(self.stride).take(self.rows).map(|row| &row[..self.width])
    }
}

impl CpuKvCache {
    pub fn new(shape: KvShape) -> Result<Self> {
        shape.check()?;
        Ok(Self { shape, k: Kept::new(&shape), v: Kept::new(&shape) })
    }

    /// Keeps the batch's keys and values, `[tokens, kv_heads * head_dim]`.
    pub fn append(&mut self, k: &[f32], v: &[f32], batch: &Batch) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let mut rows = k.chunks_exact(width).zip(v.chunks_exact(width));
        for sequence in &batch.sequences {
            let positions = sequence.context..sequence.context + sequence.rows;
            for (position, (k, v)) in positions.zip(&mut rows) {
                let slot = sequence.blocks[position / KV_BLOCK_ROWS] as usize * KV_BLOCK_ROWS
                    + position % KV_BLOCK_ROWS;
                self.k.put(slot, k);
                self.v.put(slot, v);
            }
        }
    }
}

impl Kept {
    fn new(shape: &KvShape) -> Self {
        let heads = shape.rows() * shape.kv_heads;
        match shape.dtype {
            KvDtype::Auto => Self::Plain(vec![0.0; heads * shape.head_dim]),
            KvDtype::Int8 => Self::Codes(Codes {
                codes: vec![0; heads * shape.head_dim],
                scales: vec![0.0; heads],
                head_dim: shape.head_dim,
            }),
        }
    }

    fn put(&mut self, slot: usize, row: &[f32]) {
        match self {
            Self::Plain(rows) => rows[slot * row.len()..][..row.len()].copy_from_slice(row),
            Self::Codes(Codes { codes, scales, head_dim }) => {
                let heads = row.len() / *head_dim;
                let codes = codes[slot * row.len()..][..row.len()].chunks_exact_mut(*head_dim);
                let heads = scales[slot * heads..][..heads].iter_mut().zip(codes);
                for (x, (scale, codes)) in row.chunks_exact(*head_dim).zip(heads) {
                    *scale = quantize(x, codes);
                }
            }
        }
    }

    pub fn rows(&self) -> Rows<'_> {
        match self {
            Self::Plain(rows) => Rows::Plain(rows),
            Self::Codes(codes) => Rows::Codes(codes),
        }
    }
}

impl Codes {
    /// Values of one head in `rows`, `[rows, head_dim]`, put at the end of `values`.
    fn unpack(&self, head: usize, heads: usize, rows: Range<usize>, values: &mut Vec<f32>) {
        for place in rows.map(|row| row * heads + head) {
            let start = values.len();
            values.resize(start + self.head_dim, 0.0);
            let codes = &self.codes[place * self.head_dim..][..self.head_dim];
            widen_codes(codes, self.scales[place], &mut values[start..]);
        }
    }
}

/// Where the keys of a sequence's tokens lie: one run without a cache, else its blocks, neighbours joined.
pub(super) fn runs(sequence: &SequenceRows, first_row: usize, paged: bool) -> Vec<Run> {
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

/// What one of `heads` heads of `head_dim` features sees of the tokens `seen`; codes become values in `unpacked`.
pub(super) fn parts<'a>(
    rows: Rows<'a>,
    runs: &[Run],
    seen: &Range<usize>,
    (head, heads, head_dim): (usize, usize, usize),
    unpacked: &'a mut Vec<f32>,
) -> Vec<Part<'a>> {
    let inside = runs.iter().filter_map(|run| {
        let tokens = run.tokens.start.max(seen.start)..run.tokens.end.min(seen.end);
        let row = run.row + tokens.start.saturating_sub(run.tokens.start);
        (!tokens.is_empty()).then(|| (tokens.start - seen.start, row..row + tokens.len()))
    });
    match rows {
        Rows::Plain(x) => {
            let stride = heads * head_dim;
            let part = |(before, rows): (usize, Range<usize>)| {
                let values = &x[rows.start * stride + head * head_dim..rows.end * stride];
                Part { before, rows: rows.len(), width: head_dim, values, stride }
            };
            inside.map(part).collect()
        }
        Rows::Codes(codes) => {
            unpacked.reserve(seen.len() * head_dim);
            inside.for_each(|(_, rows)| codes.unpack(head, heads, rows, unpacked));
            vec![Part { before: 0, rows: seen.len(), width: head_dim, values: unpacked, stride: head_dim }]
        }
    }
}
