//! Attention of many tokens, block by block of keys, so that no row of scores is ever whole (Milakov and Gimelshein 2018;
//! Dao et al. 2022).
//!
//! Sixteen queries are the lanes of a vector: scores, their maxima and sums, and the results lie transposed, and no lane
//! is ever added to another.

use multiversion::multiversion;

use super::AttentionShape;
use super::cpu_cache::{Part, Rows, Run, parts};
use crate::cpu::{Parts, exp, team};

/// Queries at a time.
const LANES: usize = 16;

/// Keys, or features of values, that are multiplied at a time: their sums fit the registers of AVX2 too.
const STEP: usize = 6;

/// Keys of a block: 6 KB of scores.
const BLOCK: usize = 16 * STEP;

type Lanes = [f32; LANES];

/// Consecutive tokens of one sequence, at most [`LANES`].
pub(super) struct Tile<'a> {
    /// Row of the first in q and y.
    pub row: usize,
    pub rows: usize,
    /// How many tokens of its sequence came before.
    pub position: usize,
    /// Where the keys of its sequence lie.
    pub runs: &'a [Run],
}

/// Tiles of a sequence that has rows `row` to `row + rows`.
pub(super) fn tiles<'a>(
    row: usize,
    rows: usize,
    context: usize,
    runs: &'a [Run],
) -> impl Iterator<Item = Tile<'a>> {
    let tile = move |i| Tile { row: row + i, rows: LANES.min(rows - i), position: context + i, runs };
    (0..rows).step_by(LANES).map(tile)
}

/// What the queries of a tile have found so far.
struct State {
    /// `[head_dim]`
    q: Vec<Lanes>,
    /// `[head_dim]`: weighted sums of values.
    y: Vec<Lanes>,
    largest: Lanes,
    total: Lanes,
}

/// Writes the rows of `tiles` in y, which is like q.
pub(super) fn attend(q: &[f32], [k, v]: [Rows; 2], tiles: &[Tile], shape: &AttentionShape, y: &mut [f32]) {
    let (d, together) = (shape.head_dim, shape.heads / shape.kv_heads);
    let y = Parts::of(y);
    team::for_each(tiles.len() * shape.kv_heads, |i| {
        // The last tiles of a sequence see most: they come first.
        let (tile, kv_head) = (&tiles[tiles.len() - 1 - i / shape.kv_heads], i % shape.kv_heads);
        let first = |lane: usize| shape.window.map_or(0, |w| (tile.position + lane + 1).saturating_sub(w));
        let seen = first(0)..tile.position + tile.rows;
        let place = (kv_head, shape.kv_heads, d);
        let (mut unpacked_k, mut unpacked_v) = (Vec::new(), Vec::new());
        let keys = parts(k, tile.runs, &seen, place, &mut unpacked_k);
        let values = parts(v, tile.runs, &seen, place, &mut unpacked_v);
        let mut state = State::new(d);
        for head in kv_head * together..(kv_head + 1) * together {
            let columns = |row: usize| ((tile.row + row) * shape.heads + head) * d;
            state.start((0..tile.rows).map(|row| &q[columns(row)..][..d]), shape.scale);
            for (keys, values) in keys.iter().zip(&values) {
                let tokens = seen.start + keys.before;
                state.see(keys, values, |lane| first(lane)..tile.position + lane + 1, tokens);
            }
            for row in 0..tile.rows {
                // SAFETY: every tile has rows of its own, every head columns of its own.
                state.finish(row, unsafe { y.part(columns(row), d) });
            }
        }
    });
}

impl State {
    fn new(d: usize) -> Self {
        Self { q: vec![[0.0; LANES]; d], y: vec![[0.0; LANES]; d], largest: [0.0; LANES], total: [0.0; LANES] }
    }

    /// Begins with other queries.
    fn start<'a>(&mut self, queries: impl Iterator<Item = &'a [f32]>, scale: f32) {
        self.q.fill([0.0; LANES]);
        self.y.fill([0.0; LANES]);
        // Less than any score, but a number: a lane may see nothing of a block.
        (self.largest, self.total) = ([f32::MIN; LANES], [0.0; LANES]);
        for (lane, query) in queries.enumerate() {
            self.q.iter_mut().zip(query).for_each(|(q, x)| q[lane] = x * scale);
        }
    }

    /// Goes on with keys and values of the tokens from `first` on, of which a lane sees those in `seen`.
    fn see(&mut self, keys: &Part, values: &Part, seen: impl Fn(usize) -> std::ops::Range<usize>, first: usize) {
        let mut scores = [[0.0; LANES]; BLOCK];
        for start in (0..keys.rows).step_by(BLOCK) {
            let count = BLOCK.min(keys.rows - start);
            let scores = &mut scores[..count];
            score(&self.q, keys, start, scores);
            for lane in 0..LANES {
                let (seen, block) = (seen(lane), first + start..first + start + count);
                if seen.start > block.start || seen.end < block.end {
                    let unseen = block.zip(scores.iter_mut()).filter(|(token, _)| !seen.contains(token));
                    unseen.for_each(|(_, score)| score[lane] = f32::NEG_INFINITY);
                }
            }
            weigh(scores, &mut self.largest, &mut self.total, &mut self.y);
            mix(scores, values, start, &mut self.y);
        }
    }

    fn finish(&self, lane: usize, y: &mut [f32]) {
        let factor = 1.0 / self.total[lane];
        y.iter_mut().zip(&self.y).for_each(|(y, sum)| *y = sum[lane] * factor);
    }
}

/// Products of all queries with the keys from `start` on.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn score(q: &[Lanes], keys: &Part, start: usize, scores: &mut [Lanes]) {
    for (step, scores) in scores.chunks_mut(STEP).enumerate() {
        // The last step may have fewer keys: then some are multiplied twice.
        let row = |i: usize| &keys.row(start + step * STEP + i.min(scores.len() - 1))[..q.len()];
        let keys: [&[f32]; STEP] = std::array::from_fn(row);
        let mut sums = [[0f32; LANES]; STEP];
        for (i, q) in q.iter().enumerate() {
            for (sum, key) in sums.iter_mut().zip(&keys) {
                for lane in 0..LANES {
                    sum[lane] = q[lane].mul_add(key[i], sum[lane]);
                }
            }
        }
        scores.copy_from_slice(&sums[..scores.len()]);
    }
}

/// Scores to weights, what was found before being scaled where a larger score is among them.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn weigh(scores: &mut [Lanes], largest: &mut Lanes, total: &mut Lanes, y: &mut [Lanes]) {
    let mut most = *largest;
    for score in scores.iter() {
        for lane in 0..LANES {
            most[lane] = most[lane].max(score[lane]);
        }
    }
    let mut factor = [0f32; LANES];
    for lane in 0..LANES {
        factor[lane] = exp(largest[lane] - most[lane]);
        total[lane] *= factor[lane];
    }
    for score in scores {
        for lane in 0..LANES {
            score[lane] = exp(score[lane] - most[lane]);
            total[lane] += score[lane];
        }
    }
    if *largest != most {
        for y in y {
            for lane in 0..LANES {
                y[lane] *= factor[lane];
            }
        }
    }
    *largest = most;
}

/// `y += weights values`, for the values from `start` on.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn mix(weights: &[Lanes], values: &Part, start: usize, y: &mut [Lanes]) {
    for (step, y) in y.chunks_mut(STEP).enumerate() {
        let mut sums = [[0f32; LANES]; STEP];
        for (i, weights) in weights.iter().enumerate() {
            let value = &values.row(start + i)[step * STEP..][..y.len()];
            let value: [f32; STEP] = std::array::from_fn(|j| value[j.min(value.len() - 1)]);
            for (sum, value) in sums.iter_mut().zip(&value) {
                for lane in 0..LANES {
                    sum[lane] = weights[lane].mul_add(*value, sum[lane]);
                }
            }
        }
        for (y, sum) in y.iter_mut().zip(&sums) {
            for lane in 0..LANES {
                y[lane] += sum[lane];
            }
        }
    }
}
