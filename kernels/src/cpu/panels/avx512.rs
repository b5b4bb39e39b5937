//! The product with AVX-512 and its integer dot products: 32 rows are two registers.
//!
//! Codes of at most 4 bits are multiplied as bytes, by the high and the low byte of each activation: the products of a
//! word take as many instructions as those of 16 bits, and unpacking it half as many.

use std::arch::x86_64::*;

use super::kernels::{Arrange, Multiply};
use super::{Lanes, PANEL, Run, Scales, Task, UNPACKED, Zeros, mask, pairs_in_word, portable};
use crate::cpu::read_ahead;

type Pair<T> = [T; 2];

/// See [`super::Kernels::multiply`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply<const BITS: usize, const T: usize>(task: &Task, y: &mut [[f32; PANEL]]) {
    for (r, run) in task.runs.iter().enumerate() {
        // Loops over `0..T` alone are unrolled, so that sums stay in registers from here on.
        let (totals, steps) = (&task.totals[r * T..][..T], &task.steps[r * T..][..T]);
        // A lone token has several sums in turn: a product waits long for the one before it.
        let sets = if T == 1 { 4 } else { 1 };
        let mut sums = [[[_mm512_setzero_si512(); 2]; T]; 4];
        for t in 0..T {
            sums[0][t] = times(-totals[t], &task.zeros, run.group);
        }
        let stride = pairs_in_word(BITS) * T;
        let x = task.x[run.at * stride..][..run.words * stride].chunks_exact(stride);
        for (words, x) in task.codes[run.at..][..run.words].iter().zip(x) {
            let words = if BITS == UNPACKED { load(words) } else { load_far(words) };
            for i in 0..pairs_in_word(BITS) {
                let pairs = words.map(|word| field::<BITS>(word, i));
                for t in 0..T {
                    let x = _mm512_set1_epi32(x[i * T + t]);
                    for half in 0..2 {
                        let sum = &mut sums[i % sets][t][half];
                        *sum = _mm512_dpwssd_epi32(*sum, pairs[half], x);
                    }
                }
            }
        }
        let scales = scales(&task.scales, run.group);
        for t in 0..T {
            for half in 0..2 {
                let mut sum = sums[0][t][half];
                for more in &sums[1..sets] {
                    sum = _mm512_add_epi32(sum, more[t][half]);
                }
                add(&mut y[t][16 * half..][..16], sum, scales[half], steps[t]);
            }
        }
    }
}

/// The product of codes and activations as bytes, and what puts these in order for it, where it is the faster one.
pub(super) fn of_bytes(bits: usize, tokens: usize) -> Option<(Arrange, Multiply)> {
    Some(match (bits, tokens) {
        (2, 1) => (bytes_apart::<2>, multiply_bytes::<2, 1>),
        (2, 2) => (bytes_apart::<2>, multiply_bytes::<2, 2>),
        (2, 4) => (bytes_apart::<2>, multiply_bytes::<2, 4>),
        (2, 8) => (bytes_apart::<2>, multiply_bytes::<2, 8>),
        (4, 1) => (bytes_apart::<4>, multiply_bytes::<4, 1>),
        (4, 2) => (bytes_apart::<4>, multiply_bytes::<4, 2>),
        (4, 4) => (bytes_apart::<4>, multiply_bytes::<4, 4>),
        (4, 8) => (bytes_apart::<4>, multiply_bytes::<4, 8>),
        _ => return None,
    })
}

/// See [`super::Kernels::arrange`]. The four bytes of a word hold, at the same place, the codes of two pairs, first ones
/// before second ones: of their features the high bytes come first, then the low ones.
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn bytes_apart<const BITS: usize>(pairs: &mut [i32]) {
    let together = match BITS {
        2 => _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0),
        _ => _mm512_set_epi32(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0),
    };
    let apart = _mm512_broadcast_i32x4(_mm_set_epi8(14, 10, 12, 8, 15, 11, 13, 9, 6, 2, 4, 0, 7, 3, 5, 1));
    for pairs in pairs.chunks_mut(16) {
        let all = u16::MAX >> (16 - pairs.len());
        // SAFETY: as many as there are.
        unsafe {
            let bytes = _mm512_permutexvar_epi32(together, _mm512_maskz_loadu_epi32(all, pairs.as_ptr()));
            _mm512_mask_storeu_epi32(pairs.as_mut_ptr(), all, _mm512_shuffle_epi8(bytes, apart));
        }
    }
}

/// See [`super::Kernels::multiply`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn multiply_bytes<const BITS: usize, const T: usize>(task: &Task, y: &mut [[f32; PANEL]]) {
    for (r, run) in task.runs.iter().enumerate() {
        // Four tokens at a time: their sums fill half of the registers.
        match T {
            8 => {
                add_run::<BITS, T, 4>(task, (r, run), 0, y);
                add_run::<BITS, T, 4>(task, (r, run), 4, y);
            }
            _ => add_run::<BITS, T, T>(task, (r, run), 0, y),
        }
    }
}

/// One run for `N` of `T` tokens, from `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_run<const BITS: usize, const T: usize, const N: usize>(
    task: &Task,
    (r, run): (usize, &Run),
    first: usize,
    y: &mut [[f32; PANEL]],
) {
    let (totals, steps) = (&task.totals[r * T + first..][..N], &task.steps[r * T + first..][..N]);
    let (fields, stride) = (8 / BITS, pairs_in_word(BITS) * T);
    // In turn where tokens are few: a product waits long for the one before it.
    let sets = if N <= 2 { 2 } else { 1 };
    let mut lows = [[[_mm512_setzero_si512(); 2]; N]; 2];
    let mut highs = [[[_mm512_setzero_si512(); 2]; N]; 2];
    for t in 0..N {
        lows[0][t] = times(-totals[t], &task.zeros, run.group);
    }
    let x = task.x[run.at * stride..][..run.words * stride].chunks_exact(stride);
    for (words, x) in task.codes[run.at..][..run.words].iter().zip(x) {
        let words = load_far(words);
        for i in 0..fields {
            let codes = words.map(|word| bytes::<BITS>(word, i));
            for t in 0..N {
                let high = _mm512_set1_epi32(x[2 * i * T + first + t]);
                let low = _mm512_set1_epi32(x[(2 * i + 1) * T + first + t]);
                for half in 0..2 {
                    // The first factor has no sign, the second one has.
                    let sum = &mut lows[i % sets][t][half];
                    *sum = _mm512_dpbusd_epi32(*sum, low, codes[half]);
                    let sum = &mut highs[i % sets][t][half];
                    *sum = _mm512_dpbusd_epi32(*sum, codes[half], high);
                }
            }
        }
    }
    let scales = scales(&task.scales, run.group);
    for t in 0..N {
        for half in 0..2 {
            let (mut low, mut high) = (lows[0][t][half], highs[0][t][half]);
            if sets > 1 {
                low = _mm512_add_epi32(low, lows[1][t][half]);
                high = _mm512_add_epi32(high, highs[1][t][half]);
            }
            let sum = _mm512_add_epi32(low, _mm512_slli_epi32::<8>(high));
            add(&mut y[first + t][16 * half..][..16], sum, scales[half], steps[t]);
        }
    }
}

/// y += a run's sum times its scale and the token's step, for 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn add(y: &mut [f32], sum: __m512i, scale: __m512, step: f32) {
    let place = y[..16].as_mut_ptr();
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(step));
    // SAFETY: 16 values from `place` on.
    unsafe {
        let y = _mm512_loadu_ps(place);
        _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y));
    }
}

/// See [`super::Kernels::gather`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn gather(x: &[f32], order: &[u32], values: &mut [f32]) {
    let (values, rest) = values.as_chunks_mut::<16>();
    let (orders, last) = order.as_chunks::<16>();
    let count = _mm512_set1_epi32(x.len() as i32);
    for (values, order) in values.iter_mut().zip(orders) {
        // SAFETY: 16 places and 16 values, all of them within `x`.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            let inside = _mm512_cmplt_epu32_mask(order, count);
            assert_eq!(inside, u16::MAX, "a feature beyond the end");
            _mm512_storeu_ps(values.as_mut_ptr(), _mm512_i32gather_ps::<4>(order, x.as_ptr()));
        }
    }
    portable::gather(x, last, rest);
}

/// See [`super::Kernels::unpack`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpack<const BITS: usize>(words: &[Lanes], pairs: &mut [Lanes]) {
    for (words, pairs) in words.iter().zip(pairs.chunks_exact_mut(pairs_in_word(BITS))) {
        let words = load_far(words);
        for (i, pairs) in pairs.iter_mut().enumerate() {
            let place = pairs.0.as_mut_ptr();
            // SAFETY: 32 words from `place` on.
            unsafe {
                _mm512_storeu_si512(place.cast(), field::<BITS>(words[0], i));
                _mm512_storeu_si512(place.add(16).cast(), field::<BITS>(words[1], i));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load(words: &Lanes) -> Pair<__m512i> {
    let place = words.0.as_ptr();
    // SAFETY: 32 words from `place` on.
    unsafe { [_mm512_loadu_si512(place.cast()), _mm512_loadu_si512(place.add(16).cast())] }
}

/// The same of codes that no cache holds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn load_far(words: &Lanes) -> Pair<__m512i> {
    read_ahead(words.0.as_ptr());
    read_ahead(words.0[16..].as_ptr());
    load(words)
}

/// Pair `i` of every word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn field<const BITS: usize>(word: __m512i, i: usize) -> __m512i {
    let shifted = _mm512_srlv_epi32(word, _mm512_set1_epi32((BITS * i) as i32));
    _mm512_and_si512(shifted, _mm512_set1_epi32(mask(BITS) as i32))
}

/// The bits of field `i` in every byte, which holds as many codes as there are fields.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn bytes<const BITS: usize>(word: __m512i, i: usize) -> __m512i {
    let shifted = _mm512_srlv_epi32(word, _mm512_set1_epi32((BITS * i) as i32));
    _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1))
}

/// The zero points of a group, times `factor`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn times(factor: i32, zeros: &Zeros, group: usize) -> Pair<__m512i> {
    match zeros {
        Zeros::Same(zero) => [_mm512_set1_epi32(factor * i32::from(*zero)); 2],
        Zeros::Each(zeros) => {
            let place = zeros[group].as_ptr();
            // SAFETY: 32 values from `place` on.
            let halves =
                unsafe { [_mm256_loadu_si256(place.cast()), _mm256_loadu_si256(place.add(16).cast())] };
            halves.map(|half| _mm512_mullo_epi32(_mm512_cvtepu16_epi32(half), _mm512_set1_epi32(factor)))
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn scales(scales: &Scales, group: usize) -> Pair<__m512> {
    // SAFETY: each holds 32 values.
    unsafe {
        match scales {
            Scales::F16(scales) => {
                let place = scales[group].as_ptr();
                [place, place.add(16)].map(|half| _mm512_cvtph_ps(_mm256_loadu_si256(half.cast())))
            }
            Scales::F32(scales) => {
                let place = scales[group].as_ptr();
                [_mm512_loadu_ps(place), _mm512_loadu_ps(place.add(16))]
            }
        }
    }
}
