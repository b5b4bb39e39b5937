//! The product with AVX-512 and its integer dot products: 32 rows are two registers.

use std::arch::x86_64::*;

use super::{Lanes, PANEL, Scales, Task, Zeros, mask, pairs_in_word};

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
        let mut sums = [[_mm512_setzero_si512(); 2]; T];
        for t in 0..T {
            sums[t] = times(-totals[t], &task.zeros, run.group);
        }
        let stride = pairs_in_word(BITS) * T;
        let x = task.x[run.at * stride..][..run.words * stride].chunks_exact(stride);
        for (words, x) in task.codes[run.at..][..run.words].iter().zip(x) {
            let words = load(words);
            for i in 0..pairs_in_word(BITS) {
                let pairs = words.map(|word| field::<BITS>(word, i));
                for t in 0..T {
                    let x = _mm512_set1_epi32(x[i * T + t]);
                    for half in 0..2 {
                        sums[t][half] = _mm512_dpwssd_epi32(sums[t][half], pairs[half], x);
                    }
                }
            }
        }
        let (scales, y) = (scales(&task.scales, run.group), &mut y[..T]);
        for t in 0..T {
            let step = _mm512_set1_ps(steps[t]);
            for half in 0..2 {
                let place = y[t][16 * half..][..16].as_mut_ptr();
                let scale = _mm512_mul_ps(scales[half], step);
                // SAFETY: 16 values from `place` on.
                unsafe {
                    let y = _mm512_loadu_ps(place);
                    let sum = _mm512_cvtepi32_ps(sums[t][half]);
                    _mm512_storeu_ps(place, _mm512_fmadd_ps(sum, scale, y));
                }
            }
        }
    }
}

/// See [`super::Kernels::unpack`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn unpack<const BITS: usize>(words: &[Lanes], pairs: &mut [Lanes]) {
    for (words, pairs) in words.iter().zip(pairs.chunks_exact_mut(pairs_in_word(BITS))) {
        let words = load(words);
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

/// Pair `i` of every word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn field<const BITS: usize>(word: __m512i, i: usize) -> __m512i {
    let shifted = _mm512_srlv_epi32(word, _mm512_set1_epi32((BITS * i) as i32));
    _mm512_and_si512(shifted, _mm512_set1_epi32(mask(BITS) as i32))
}

/// The zero points of a group, times `factor`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn times(factor: i32, zeros: &Zeros, group: usize) -> Pair<__m512i> {
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
fn scales(scales: &Scales, group: usize) -> Pair<__m512> {
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
