//! The dot products with AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::DenseRow;
use super::registers::{BF16, F16, F32, TOGETHER, dots};
use crate::cpu::read_ahead;

dots!(
    dots_avx512,
    some_avx512,
    widen_avx512,
    "avx512f,avx512bw,avx512vl",
    16,
    __m512,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps,
    _mm512_storeu_ps
);
dots!(
    dots_avx2,
    some_avx2,
    widen_avx2,
    "avx2,fma,f16c",
    8,
    __m256,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    _mm256_storeu_ps
);

/// Sixteen elements from `i` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen_avx512<const KIND: u8>(w: *const u8, i: usize) -> __m512 {
    // SAFETY: the caller has seen to it that there are sixteen.
    unsafe {
        match KIND {
            F32 => _mm512_loadu_ps(w.cast::<f32>().add(i)),
            _ => {
                let halves = _mm256_loadu_si256(w.cast::<u16>().add(i).cast());
                match KIND {
                    F16 => _mm512_cvtph_ps(halves),
                    _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))),
                }
            }
        }
    }
}

/// Eight elements from `i` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_avx2<const KIND: u8>(w: *const u8, i: usize) -> __m256 {
    // SAFETY: the caller has seen to it that there are eight.
    unsafe {
        match KIND {
            F32 => _mm256_loadu_ps(w.cast::<f32>().add(i)),
            _ => {
                let halves = _mm_loadu_si128(w.cast::<u16>().add(i).cast());
                match KIND {
                    F16 => _mm256_cvtph_ps(halves),
                    _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))),
                }
            }
        }
    }
}
