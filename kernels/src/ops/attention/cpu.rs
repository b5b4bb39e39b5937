use std::ops::Range;

use candle_core::Tensor;

use super::cpu_cache::{CpuKvCache, Rows, Run, runs};
use super::cpu_step::{self, MOST_ROWS, Token};
use super::cpu_strips::Strips;
use super::cpu_tile::{TILE, Tile};
use super::{Attention, AttentionShape, KvShape, check};
use crate::cpu::{Parts, View, team};
use crate::{Batch, Cpu, Device, Result, SequenceRows};

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

/// A sequence of a batch: its first row, and where its keys lie.
struct Sequence<'a> {
    rows: &'a SequenceRows,
    first: usize,
    runs: Vec<Run>,
}

fn attend(q: &[f32], kv: [Rows; 2], batch: &Batch, shape: &AttentionShape, paged: bool) -> Vec<f32> {
    let firsts = batch.sequences.iter().scan(0, |next, s| Some(std::mem::replace(next, *next + s.rows)));
    let sequences = batch.sequences.iter().zip(firsts);
    let (long, short): (Vec<_>, Vec<_>) = sequences
        .map(|(rows, first)| Sequence { rows, first, runs: runs(rows, first, paged) })
        .partition(|sequence| sequence.rows.rows > MOST_ROWS);
    let strips: Vec<_> = long.iter().map(|s| Strips::of(kv, &s.runs, seen(s.rows, shape), shape)).collect();
    let tiles: Vec<_> = long.iter().zip(&strips).flat_map(|(s, strips)| s.tiles(strips)).collect();
    let tokens: Vec<_> = short.iter().flat_map(Sequence::tokens).collect();
    let mut y = Vec::with_capacity(q.len());
    let parts = Parts::of(&mut y.spare_capacity_mut()[..q.len()]);
    // One head after the other, so that its keys and values stay in a core's cache.
    team::for_each(tiles.len() * shape.heads, |i| {
        tiles[i % tiles.len()].head(q, i / tiles.len(), shape, &parts);
    });
    cpu_step::attend(q, kv, &tokens, shape, &parts);
    // SAFETY: every row is of one tile or one token, and written for all heads.
    unsafe { y.set_len(q.len()) };
    y
}

impl Sequence<'_> {
    fn tiles<'a>(&self, strips: &'a Strips) -> impl Iterator<Item = Tile<'a>> {
        let (first, SequenceRows { context, rows, .. }) = (self.first, self.rows);
        let tile = move |row| Tile {
            first: first + row,
            rows: TILE.min(rows - row),
            position: context + row,
            strips,
        };
        (0..*rows).step_by(TILE).map(tile)
    }

    fn tokens(&self) -> impl Iterator<Item = Token<'_>> {
        let token = |i| Token { row: self.first + i, position: self.rows.context + i, runs: &self.runs };
        (0..self.rows.rows).map(token)
    }
}

/// What the rows of a sequence see.
fn seen(rows: &SequenceRows, shape: &AttentionShape) -> Range<usize> {
    let first = shape.window.map_or(0, |window| (rows.context + 1).saturating_sub(window));
    first..rows.context + rows.rows
}
