//! Attention of few tokens: every key and value is read once for all query heads that share it.

use std::mem::MaybeUninit;
use std::ops::Range;

use multiversion::multiversion;

use super::AttentionShape;
use super::cpu_cache::{Part, Rows, Run, parts};
use crate::cpu::{Isa, Parts, exp_in_place, maximum, soft_cap, team, zeroed};

/// Up to so many tokens of a sequence are taken one by one.
pub(super) const MOST_ROWS: usize = 4;

/// Features that are summed at a time.
const LANES: usize = 16;

/// Features of a value that stay in registers.
const STRIP: usize = 64;

/// Keys or values of a head that are read before those of the next.
const TOGETHER: usize = 16;

/// Tokens for each thread with which it has work enough, so that one thread takes all heads of a token.
const ENOUGH: usize = 4;

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
pub(super) fn attend(
    q: &[f32],
    kv: [Rows; 2],
    tokens: &[Token],
    shape: &AttentionShape,
    y: &Parts<MaybeUninit<f32>>,
) {
    // Heads of a token lie next to one another: read together, memory is read in long stretches.
    let enough = tokens.len() >= ENOUGH * rayon::current_num_threads();
    let heads = if enough { shape.kv_heads } else { 1 };
    let (pieces, width) = (shape.kv_heads / heads, heads * shape.heads / shape.kv_heads * shape.head_dim);
    team::for_each(tokens.len() * pieces, |i| {
        let (token, piece) = (&tokens[i / pieces], i % pieces);
        let columns = (token.row * pieces + piece) * width;
        // SAFETY: every token has a row of its own, and every piece columns.
        let y = zeroed(unsafe { y.part(columns, width) });
        token.attend(&q[columns..][..width], kv, piece * heads..(piece + 1) * heads, shape, y);
    });
}

impl Token<'_> {
    /// Adds the outputs of query heads, those that share `kv_heads`.
    fn attend(
        &self,
        q: &[f32],
        [k, v]: [Rows; 2],
        kv_heads: Range<usize>,
        shape: &AttentionShape,
        y: &mut [f32],
    ) {
        let first = shape.window.map_or(0, |window| (self.position + 1).saturating_sub(window));
        let (d, seen) = (shape.head_dim, first..self.position + 1);
        let mut unpacked = vec![[Vec::new(), Vec::new()]; kv_heads.len()];
        let heads = kv_heads.zip(&mut unpacked).map(|(head, [unpacked_k, unpacked_v])| {
            let place = (head, shape.kv_heads, d);
            (parts(k, self.runs, &seen, place, unpacked_k), parts(v, self.runs, &seen, place, unpacked_v))
        });
        let (keys, values): (Vec<_>, Vec<_>) = heads.unzip();
        let shared = shape.heads / shape.kv_heads;
        let mut scores = vec![0.0; shared * keys.len() * seen.len()];
        some_of_all(&keys, |head, keys| {
            let scores = &mut scores[head * shared * seen.len()..][..shared * seen.len()];
            score(&q[head * shared * d..][..shared * d], &keys, shape.scale, scores, seen.len());
        });
        if let Some(cap) = shape.soft_cap {
            soft_cap(&mut scores, cap);
        }
        for scores in scores.chunks_exact_mut(seen.len()) {
            let largest = maximum(scores);
            let factor = 1.0 / exp_in_place(scores, largest);
            scores.iter_mut().for_each(|score| *score *= factor);
        }
        some_of_all(&values, |head, values| {
            let weights = scores[head * shared * seen.len()..].chunks_exact(seen.len());
            for (weights, y) in weights.zip(y[head * shared * d..][..shared * d].chunks_exact_mut(d)) {
                mix(&weights[values.before..][..values.rows], &values, y);
            }
        });
    }
}

/// `work(head, rows)` for some rows of every head, then for the next ones; each head has as many.
fn some_of_all(heads: &[Vec<Part>], mut work: impl FnMut(usize, Part)) {
    for (i, part) in heads.first().into_iter().flatten().enumerate() {
        for first in (0..part.rows).step_by(TOGETHER) {
            heads.iter().enumerate().for_each(|(head, parts)| work(head, parts[i].some(first, TOGETHER)));
        }
    }
}

/// Scores of up to [`TOGETHER`] keys for all heads of q; of a head there are `length`.
fn score(q: &[f32], keys: &Part, scale: f32, scores: &mut [f32], length: usize) {
    for (query, scores) in q.chunks_exact(keys.width).zip(scores.chunks_exact_mut(length)) {
        let scores = &mut scores[keys.before..][..keys.rows];
        dots(query, keys, scores, Isa::best());
        scores.iter_mut().for_each(|score| *score *= scale);
    }
}

/// The products of `query` with each of up to [`TOGETHER`] keys, to the last bit the same in every version. `isa` must be one
/// of those that the processor has.
fn dots(query: &[f32], keys: &Part, scores: &mut [f32], isa: Isa) {
    match isa {
        // SAFETY: `isa` chose instructions that the processor has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::dots(query, keys, scores) },
        _ => dots_one_by_one(query, keys, scores),
    }
}

#[multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn dots_one_by_one(query: &[f32], keys: &Part, scores: &mut [f32]) {
    for (key, score) in keys.iter().zip(scores) {
        let (blocks_q, blocks_k) = (query.as_chunks::<LANES>(), key.as_chunks::<LANES>());
        let mut sums = [0f32; LANES];
        for (query, key) in blocks_q.0.iter().zip(blocks_k.0) {
            for lane in 0..LANES {
                sums[lane] = query[lane].mul_add(key[lane], sums[lane]);
            }
        }
        for ((q, k), sum) in blocks_q.1.iter().zip(blocks_k.1).zip(&mut sums) {
            *sum = q.mul_add(*k, *sum);
        }
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
        }
        *score = sums[0];
    }
}

/// `y += sum_i weights[i] values[i]`, one after the other, so that it does not matter how they are cut into parts.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn mix(weights: &[f32], values: &Part, y: &mut [f32]) {
    for (strip, y) in y.chunks_mut(STRIP).enumerate() {
        let padded = |x: &[f32]| -> [f32; STRIP] {
            let mut padded = [0.0; STRIP];
            padded[..x.len()].copy_from_slice(x);
            padded
        };
        let mut sums = padded(y);
        for (weight, value) in weights.iter().zip(values.iter()) {
            let value = match value[strip * STRIP..].first_chunk() {
                Some(value) => *value,
                None => padded(&value[strip * STRIP..]),
            };
            for lane in 0..STRIP {
                sums[lane] = weight.mul_add(value[lane], sums[lane]);
            }
        }
        y.copy_from_slice(&sums[..y.len()]);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Part, TOGETHER};

    /// See [`super::dots`]: 16 keys at once, so that the lanes of 16 sums are added in one go.
    ///
    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn dots(query: &[f32], keys: &Part, scores: &mut [f32]) {
        // Where there are fewer keys, the last stands for those that are missing.
        let places: [_; TOGETHER] = std::array::from_fn(|i| keys.place(i.min(keys.rows - 1)));
        let mut sums = [_mm512_setzero_ps(); TOGETHER];
        for (i, q) in query.chunks(LANES).enumerate() {
            let inside = ((1u32 << q.len()) - 1) as __mmask16;
            // SAFETY: masks leave out what is beyond the end of the query and of keys, which are as long.
            unsafe {
                let q = _mm512_maskz_loadu_ps(inside, q.as_ptr());
                for k in 0..TOGETHER {
                    let key = _mm512_maskz_loadu_ps(inside, places[k].add(i * LANES));
                    sums[k] = _mm512_fmadd_ps(q, key, sums[k]);
                }
            }
        }
        let inside = ((1u32 << scores.len().min(TOGETHER)) - 1) as __mmask16;
        // SAFETY: the mask leaves out what is beyond the end.
        unsafe { _mm512_mask_storeu_ps(scores.as_mut_ptr(), inside, add_lanes(sums)) };
    }

    /// Lane `i` of the result is the sum of the lanes of `sums[i]`, of which each is first added to that 8 further on, then
    /// to those 4, 2 and 1 further on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_lanes(sums: [__m512; TOGETHER]) -> __m512 {
        // Two quarters of `i` and of `i + 4`.
        let halves = |i: usize| {
            let [a, b] = [sums[i], sums[i + 4]];
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b))
        };
        // A quarter of each of `i`, `i + 4`, `i + 8` and `i + 12`.
        let quarters = |i: usize| {
            let [a, b] = [halves(i), halves(i + 8)];
            let [a, b] = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b)];
            _mm512_castps_pd(_mm512_add_ps(a, b))
        };
        let pairs = |i: usize| {
            let [a, b] = [quarters(i), quarters(i + 1)];
            let [a, b] = [_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)];
            _mm512_add_ps(_mm512_castpd_ps(a), _mm512_castpd_ps(b))
        };
        let [a, b] = [pairs(0), pairs(2)];
        _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SequenceRows;
    use crate::ops::attention::cpu_cache::runs;
    use crate::testing::{NMSE_F32, assert_close, random};

    #[test]
    fn every_version_multiplies_keys_of_any_width_and_number_to_the_same_bits() {
        for (rows, width) in [(1, 1), (3, 16), (15, 40), (16, 64), (16, 100)] {
            // Keys of one head of two, so that others lie between them.
            let (query, all) = (random(1, width), random(2, rows * 2 * width));
            let key = |i: usize| &all[(2 * i + 1) * width..][..width];
            let dot = |i: usize| key(i).iter().zip(&query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum();
            let expected: Vec<f64> = (0..rows).map(dot).collect();
            let runs = runs(&SequenceRows { context: 0, rows, blocks: vec![] }, 0, false);
            let mut unpacked = Vec::new();
            let parts = parts(Rows::Plain(&all), &runs, &(0..rows), (1, 2, width), &mut unpacked);
            let of = |isa| {
                // One more than there are keys, which stays as it is.
                let mut scores = vec![7.0; rows + 1];
                dots(&query, &parts[0], &mut scores[..rows], isa);
                assert_eq!(scores.pop(), Some(7.0));
                scores
            };
            let plain = of(Isa::Portable);
            assert_close(&format!("{rows} keys of {width}"), &plain, &expected, NMSE_F32);
            assert!(Isa::all().into_iter().all(|isa| of(isa) == plain), "{rows} keys of {width}");
        }
    }
}
