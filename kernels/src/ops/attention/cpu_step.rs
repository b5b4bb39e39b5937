//! Attention of few tokens: every key and value is read once for all query heads that share it.

use multiversion::multiversion;

use super::AttentionShape;
use super::cpu_cache::{Part, Rows, Run, parts};
use crate::cpu::{Parts, exp_in_place, maximum, soft_cap, team};

/// Up to so many tokens of a sequence are taken one by one.
pub(super) const MOST_ROWS: usize = 4;

/// Features that are summed at a time.
const LANES: usize = 16;

/// Features of a value that stay in registers.
const STRIP: usize = 64;

/// One token of a sequence.
pub(super) struct Token<'a> {
    /// Its row in q and y.
    pub row: usize,
    /// How many tokens of its sequence came before.
    pub position: usize,
    /// Where the keys of its sequence lie.
    pub runs: &'a [Run],
}

/// Writes the rows of `tokens` in y, which is like q.
pub(super) fn attend(q: &[f32], [k, v]: [Rows; 2], tokens: &[Token], shape: &AttentionShape, y: &mut [f32]) {
    let (d, together) = (shape.head_dim, shape.heads / shape.kv_heads);
    let y = Parts::of(y);
    team::for_each(tokens.len() * shape.kv_heads, |i| {
        let (token, kv_head) = (&tokens[i / shape.kv_heads], i % shape.kv_heads);
        let first = shape.window.map_or(0, |window| (token.position + 1).saturating_sub(window));
        let seen = first..token.position + 1;
        let place = (kv_head, shape.kv_heads, d);
        let (mut unpacked_k, mut unpacked_v) = (Vec::new(), Vec::new());
        let keys = parts(k, token.runs, &seen, place, &mut unpacked_k);
        let values = parts(v, token.runs, &seen, place, &mut unpacked_v);
        let columns = (token.row * shape.heads + kv_head * together) * d;
        let q = &q[columns..][..together * d];
        // SAFETY: heads that share keys have columns of their own.
        let y = unsafe { y.part(columns, together * d) };
        let mut scores = vec![0.0; together * seen.len()];
        for part in &keys {
            score(q, part, shape.scale, &mut scores, seen.len());
        }
        if let Some(cap) = shape.soft_cap {
            soft_cap(&mut scores, cap);
        }
        for (scores, y) in scores.chunks_exact_mut(seen.len()).zip(y.chunks_exact_mut(d)) {
            let largest = maximum(scores);
            let factor = 1.0 / exp_in_place(scores, largest);
            scores.iter_mut().for_each(|score| *score *= factor);
            values.iter().for_each(|part| mix(&scores[part.before..][..part.rows], part, y));
        }
    });
}

/// Scores of some keys for all heads of q; of a head there are `length`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn score(q: &[f32], keys: &Part, scale: f32, scores: &mut [f32], length: usize) {
    let d = keys.width;
    for (i, key) in keys.iter().enumerate() {
        for (query, scores) in q.chunks_exact(d).zip(scores.chunks_exact_mut(length)) {
            let (blocks_q, blocks_k) = (query.as_chunks::<LANES>(), key.as_chunks::<LANES>());
            let mut sums = [0f32; LANES];
            for (query, key) in blocks_q.0.iter().zip(blocks_k.0) {
                for lane in 0..LANES {
                    sums[lane] = query[lane].mul_add(key[lane], sums[lane]);
                }
            }
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    sums[lane] += sums[lane + half];
                }
            }
            let rest: f32 = blocks_q.1.iter().zip(blocks_k.1).map(|(q, k)| q * k).sum();
            scores[keys.before + i] = (sums[0] + rest) * scale;
        }
    }
}

/// `y += sum_i weights[i] values[i]`
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn mix(weights: &[f32], values: &Part, y: &mut [f32]) {
    for (strip, y) in y.chunks_mut(STRIP).enumerate() {
        let of = |value: &[f32]| -> [f32; STRIP] {
            let mut padded = [0.0; STRIP];
            padded[..y.len()].copy_from_slice(&value[strip * STRIP..][..y.len()]);
            padded
        };
        let mut sums = [0f32; STRIP];
        for (weight, value) in weights.iter().zip(values.iter()) {
            let value = match value[strip * STRIP..].as_chunks::<STRIP>().0.first() {
                Some(value) => *value,
                None => of(value),
            };
            for lane in 0..STRIP {
                sums[lane] = weight.mul_add(value[lane], sums[lane]);
            }
        }
        y.iter_mut().zip(&sums).for_each(|(y, sum)| *y += sum);
    }
}
