//! Dot products of one row of a weight that is not quantized with few tokens, widened in registers.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod registers;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

use super::{Isa, dot};

/// A row as it is stored, `[in]`.
#[derive(Clone, Copy)]
pub(crate) enum DenseRow<'a> {
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    F32(&'a [f32]),
}

/// `sums[t] = sum_k x[t, k] row[k]`; x: `[tokens, in]`. `isa` must be one of those that the processor has.
pub(crate) fn dots(row: DenseRow, x: &[f32], sums: &mut [f32], isa: Isa) {
    match isa {
        // SAFETY: `isa` chose instructions that the processor has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::dots_avx512(row, x, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::dots_avx2(row, x, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::dots_neon(row, x, sums) },
        Isa::Portable => {
            let values = row.to_f32();
            let k = values.len().max(1);
            sums.fill(0.0);
            sums.iter_mut().zip(x.chunks_exact(k)).for_each(|(sum, x)| *sum = dot(x, &values));
        }
    }
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
