//! Dot products of one row of a weight that is not quantized with few tokens, widened in registers.

use half::{bf16, f16};

use super::{Isa, dot};

/// Tokens that share a widened element.
const TOGETHER: usize = 4;

/// A row as it is stored, `[in]`.
#[derive(Clone, Copy)]
pub(crate) enum DenseRow<'a> {
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    F32(&'a [f32]),
}

/// `sums[t] = sum_k x[t, k] row[k]`; x: `[tokens, in]`. `isa` must be one of those that the processor has.
pub(crate) fn dots(row: DenseRow, x: &[f32], sums: &mut [f32], isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: `isa` chose instructions that the processor has.
        Isa::Avx512 => return unsafe { x86::dots_avx512(row, x, sums) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { x86::dots_avx2(row, x, sums) },
        Isa::Portable => {}
    }
    let _ = isa;
    let values = row.to_f32();
    let k = values.len().max(1);
    sums.fill(0.0);
    sums.iter_mut().zip(x.chunks_exact(k)).for_each(|(sum, x)| *sum = dot(x, &values));
}

impl DenseRow<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(row) => row.len(),
            Self::BF16(row) => row.len(),
            Self::F32(row) => row.len(),
        }
    }

    fn at(&self, i: usize) -> f32 {
        match self {
            Self::F16(row) => row[i].to_f32(),
            Self::BF16(row) => row[i].to_f32(),
            Self::F32(row) => row[i],
        }
    }

    fn to_f32(self) -> Vec<f32> {
        (0..self.len()).map(|i| self.at(i)).collect()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{DenseRow, TOGETHER};

    /// How an element is widened.
    const F16: u8 = 0;
    const BF16: u8 = 1;
    const F32: u8 = 2;

    /// The functions of one instruction set.
    macro_rules! dots {
        ($name:ident, $some:ident, $widen:ident, $features:literal, $lanes:literal, $vector:ty,
         $zero:ident, $load:ident, $fma:ident, $add:ident, $store:ident) => {
            /// # Safety
            /// The processor must have the instructions.
            #[target_feature(enable = $features)]
            pub unsafe fn $name(row: DenseRow, x: &[f32], sums: &mut [f32]) {
                let k = row.len();
                if k == 0 {
                    return sums.fill(0.0);
                }
                for (x, sums) in x.chunks(TOGETHER * k).zip(sums.chunks_mut(TOGETHER)) {
                    // SAFETY: as many elements as k, and as many tokens of as many as there are sums.
                    unsafe {
                        match (row, <&mut [f32; TOGETHER]>::try_from(&mut *sums)) {
                            (DenseRow::F16(w), Ok(sums)) => {
                                $some::<F16, TOGETHER>(w.as_ptr().cast(), k, x, sums)
                            }
                            (DenseRow::BF16(w), Ok(sums)) => {
                                $some::<BF16, TOGETHER>(w.as_ptr().cast(), k, x, sums)
                            }
                            (DenseRow::F32(w), Ok(sums)) => {
                                $some::<F32, TOGETHER>(w.as_ptr().cast(), k, x, sums)
                            }
                            (row, Err(_)) => {
                                for (x, sum) in x.chunks(k).zip(sums.iter_mut()) {
                                    let sum = std::array::from_mut(sum);
                                    match row {
                                        DenseRow::F16(w) => $some::<F16, 1>(w.as_ptr().cast(), k, x, sum),
                                        DenseRow::BF16(w) => $some::<BF16, 1>(w.as_ptr().cast(), k, x, sum),
                                        DenseRow::F32(w) => $some::<F32, 1>(w.as_ptr().cast(), k, x, sum),
                                    }
                                }
                            }
                        }
                    }
                }
                for i in k - k % (2 * $lanes)..k {
                    let weight = row.at(i);
                    sums.iter_mut().zip(x.chunks_exact(k)).for_each(|(sum, x)| *sum += weight * x[i]);
                }
            }

            /// The sums over whole pairs of registers.
            ///
            /// # Safety
            /// `w` points to `k` elements of the kind, and x holds `T` tokens of `k`.
            #[target_feature(enable = $features)]
            unsafe fn $some<const KIND: u8, const T: usize>(
                w: *const u8,
                k: usize,
                x: &[f32],
                sums: &mut [f32; T],
            ) {
                assert!(x.len() >= T * k);
                let mut parts = [[$zero(); 2]; T];
                for i in (0..k / (2 * $lanes)).map(|i| i * 2 * $lanes) {
                    // SAFETY: both registers end before `k`.
                    unsafe {
                        let weights = [$widen::<KIND>(w, i), $widen::<KIND>(w, i + $lanes)];
                        for t in 0..T {
                            let x = x.as_ptr().add(t * k + i);
                            parts[t][0] = $fma(weights[0], $load(x), parts[t][0]);
                            parts[t][1] = $fma(weights[1], $load(x.add($lanes)), parts[t][1]);
                        }
                    }
                }
                for (sum, parts) in sums.iter_mut().zip(&parts) {
                    let mut lanes = [0f32; $lanes];
                    // SAFETY: as many lanes as a register has.
                    unsafe { $store(lanes.as_mut_ptr(), $add(parts[0], parts[1])) };
                    *sum = lanes.iter().sum();
                }
            }
        };
    }

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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, matmul_f64, random};

    #[test]
    fn every_type_and_version_agrees_with_f64() {
        for (k, tokens) in [(1, 1), (31, 2), (64, 4), (100, 7), (2048, 8), (0, 3)] {
            let (w, x) = (random(1, k), random(2, tokens * k));
            let (halves, brains): (Vec<_>, Vec<_>) =
                w.iter().map(|w| (f16::from_f32(*w), bf16::from_f32(*w))).unzip();
            for row in [DenseRow::F16(&halves), DenseRow::BF16(&brains), DenseRow::F32(&w)] {
                let expected = matmul_f64(&x, &row.to_f32(), (tokens, 1, k));
                for isa in Isa::all() {
                    let mut sums = vec![7.0; tokens];
                    dots(row, &x, &mut sums, isa);
                    assert_close(&format!("{k} features, {isa:?}"), &sums, &expected, NMSE_F32);
                }
            }
        }
    }
}
