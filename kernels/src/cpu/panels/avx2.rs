//! The product with AVX2: half a panel, 16 rows in two registers, and up to four tokens at a time.

use std::arch::x86_64::*;

pub(super) use super::portable::gather;
use super::{Lanes, PANEL, Run, Scales, Task, UNPACKED, Zeros, mask, pairs_in_word};
use crate::cpu::read_ahead;

/// Rows at a time.
const HALF: usize = PANEL / 2;

/// Tokens at a time: with two sums each, they leave registers for the rest.
const TOKENS: usize = 4;

type Pair<T> = [T; 2];

/// See [`super::Kernels::multiply`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply<const BITS: usize, const T: usize>(task: &Task, y: &mut [[f32; PANEL]]) {
    for (r, run) in task.runs.iter().enumerate() {
        for first in (0..T).step_by(TOKENS) {
            for half in [0, HALF] {
                add_run::<BITS, T>(task, r, run, (first, half), y);
            }
        }
    }
}

/// One run of 16 rows from `half` on, for the tokens from `first` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_run<const BITS: usize, const T: usize>(
    task: &Task,
    r: usize,
    run: &Run,
    (first, half): (usize, usize),
    y: &mut [[f32; PANEL]],
) {
    let tokens = T.min(TOKENS);
    let zeros = zeros(&task.zeros, run.group, half);
    let mut sums = [[_mm256_setzero_si256(); 2]; TOKENS];
    for (sums, total) in sums[..tokens].iter_mut().zip(&task.totals[r * T + first..]) {
        let total = _mm256_set1_epi32(-total);
        *sums = zeros.map(|zeros| _mm256_mullo_epi32(zeros, total));
    }
    let stride = pairs_in_word(BITS) * T;
    let x = task.x[run.at * stride..][..run.words * stride].chunks_exact(stride);
    for (words, x) in task.codes[run.at..][..run.words].iter().zip(x) {
        if BITS != UNPACKED {
            read_ahead(words.0[half..].as_ptr());
        }
        let words = load(&words.0[half..][..HALF]);
        for i in 0..pairs_in_word(BITS) {
            let pairs = words.map(|word| field::<BITS>(word, i));
            for t in 0..tokens {
                let x = _mm256_set1_epi32(x[i * T + first + t]);
                for j in 0..2 {
                    sums[t][j] = _mm256_add_epi32(sums[t][j], _mm256_madd_epi16(pairs[j], x));
                }
            }
        }
    }
    let scales = scales(&task.scales, run.group, half);
    for t in 0..tokens {
        let step = _mm256_set1_ps(task.steps[r * T + first + t]);
        for j in 0..2 {
            let place = y[first + t][half + 8 * j..][..8].as_mut_ptr();
            let scale = _mm256_mul_ps(scales[j], step);
            // SAFETY: 8 values from `place` on.
            unsafe {
                let y = _mm256_loadu_ps(place);
                _mm256_storeu_ps(place, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][j]), scale, y));
            }
        }
    }
}

/// See [`super::Kernels::unpack`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn unpack<const BITS: usize>(words: &[Lanes], pairs: &mut [Lanes]) {
    for (words, pairs) in words.iter().zip(pairs.chunks_exact_mut(pairs_in_word(BITS))) {
        for half in [0, HALF] {
            let words = load(&words.0[half..][..HALF]);
            for (i, pairs) in pairs.iter_mut().enumerate() {
                for (word, pairs) in words.iter().zip(pairs.0[half..].as_chunks_mut::<8>().0) {
                    let place = pairs.as_mut_ptr();
                    // SAFETY: 8 words from `place` on.
                    unsafe { _mm256_storeu_si256(place.cast(), field::<BITS>(*word, i)) };
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(words: &[u32]) -> Pair<__m256i> {
    let place = words[..HALF].as_ptr();
    // SAFETY: 16 words from `place` on.
    unsafe { [_mm256_loadu_si256(place.cast()), _mm256_loadu_si256(place.add(8).cast())] }
}

/// Pair `i` of every word.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field<const BITS: usize>(word: __m256i, i: usize) -> __m256i {
    let shifted = _mm256_srlv_epi32(word, _mm256_set1_epi32((BITS * i) as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi32(mask(BITS) as i32))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn zeros(zeros: &Zeros, group: usize, half: usize) -> Pair<__m256i> {
    match zeros {
        Zeros::Same(zero) => [_mm256_set1_epi32(i32::from(*zero)); 2],
        Zeros::Each(zeros) => {
            let place = zeros[group][half..][..HALF].as_ptr();
            // SAFETY: 16 values from `place` on.
            let parts = unsafe { [_mm_loadu_si128(place.cast()), _mm_loadu_si128(place.add(8).cast())] };
            parts.map(|part| _mm256_cvtepu16_epi32(part))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales(scales: &Scales, group: usize, half: usize) -> Pair<__m256> {
    // SAFETY: each holds 16 values from `half` on.
    unsafe {
        match scales {
            Scales::F16(scales) => {
                let place = scales[group][half..][..HALF].as_ptr();
                [place, place.add(8)].map(|part| _mm256_cvtph_ps(_mm_loadu_si128(part.cast())))
            }
            Scales::F32(scales) => {
                let place = scales[group][half..][..HALF].as_ptr();
                [_mm256_loadu_ps(place), _mm256_loadu_ps(place.add(8))]
            }
        }
    }
}
