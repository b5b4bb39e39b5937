//! Products of f32 matrices on the tensor cores, about as exact as in f32 and several times as fast.
//!
//! Tensor cores multiply values of 11 bits (TF32). An f32 value is the sum of two of them, `a = a_high + a_low`, but for its
//! last bits; of their products the least is left out: `a b = a_low b_high + a_high b_low + a_high b_high`. Written one
//! after the other along the inner dimension, `[a_low a_high a_high]` and `[b_high b_low b_high]`, the three are one product.

use std::ops::Range;

use cudarc::driver::CudaSlice;

use super::blas::{Operand, TF32};
use super::{Args, Cuda, Launch};
use crate::Result;

pub(crate) const SOURCE: &str = include_str!("tf32.cu");

/// Below so many multiplications a product takes less time than splitting its factors.
const LEAST: usize = 1 << 28;

/// Inner dimension that is split at a time, so that the parts take little memory.
const SLAB: usize = 1024;

/// Tensor cores read matrices whose columns begin at multiples of so many values.
const ALIGNED: usize = 4;

impl Cuda {
    /// `c = alpha a b + beta c` for f32 matrices, column-major `m x n` with `k` in between: on the tensor cores where that
    /// is worth it. The error is about that of sums in f32.
    pub(crate) fn gemm_wide(
        &self,
        (m, n, k): (usize, usize, usize),
        factors: (f32, f32),
        [a, b, c]: [Operand; 3],
    ) -> Result<()> {
        let aligned = [m, c.stride, c.address as usize / size_of::<f32>()].iter().all(|n| n % ALIGNED == 0);
        if m * n * k < LEAST || !aligned {
            return self.gemm((m, n, k), factors, a, b, c);
        }
        self.gemm_in_parts((m, n, k), factors, [a, b, c])
    }

    /// The same, always on the tensor cores.
    pub(super) fn gemm_in_parts(
        &self,
        (m, n, k): (usize, usize, usize),
        (alpha, beta): (f32, f32),
        [a, b, c]: [Operand; 3],
    ) -> Result<()> {
        for start in (0..k).step_by(SLAB) {
            let slab = start..(start + SLAB).min(k);
            let left = self.parts(a, m, slab.clone(), Side::Left)?;
            let right = self.parts(b, n, slab.clone(), Side::Right)?;
            let beta = if start == 0 { beta } else { 1.0 };
            self.gemm_as(TF32, (m, n, 3 * slab.len()), (alpha, beta), [left.1, right.1, c])?;
        }
        Ok(())
    }

    /// The parts of one factor, for a range of the inner dimension; `outer` is its other dimension. They live as long as the
    /// memory returned.
    fn parts(
        &self,
        factor: Operand,
        outer: usize,
        inner: Range<usize>,
        side: Side,
    ) -> Result<(CudaSlice<f32>, Operand)> {
        let stride = (3 * inner.len()).next_multiple_of(ALIGNED);
        let parts = self.alloc::<f32>(stride * outer)?;
        // Whether columns run along the inner dimension already.
        let along = factor.transposed == (side == Side::Left);
        let skipped = if along { inner.start } else { inner.start * factor.stride };
        let args = Args::new([self.address(&parts), factor.address + (size_of::<f32>() * skipped) as u64])
            .ints([inner.len(), outer, factor.stride, stride, usize::from(side == Side::Right)]);
        if along {
            let launch = Launch::grid(inner.len().div_ceil(128), outer.min(1 << 15), 1, 128);
            self.launch("tf32_parts", launch, &args)?;
        } else {
            let launch = Launch::grid(outer.div_ceil(32), inner.len().div_ceil(32), 1, 256);
            self.launch("tf32_parts_turned", launch, &args)?;
        }
        let operand = Operand::wide(self.address(&parts), stride);
        Ok((parts, if side == Side::Left { operand.transposed() } else { operand }))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::testing::{gpus, random};

    /// The largest error of `3 a b + 2 c`, in units of the sum of its terms' magnitudes.
    fn error(gpu: &Cuda, (m, n, k): (usize, usize, usize), turned: [bool; 2]) -> f64 {
        let (a, b, c) = (random(1, m * k), random(2, k * n), random(3, m * n));
        let upload = |values: &[f32]| gpu.upload(values).unwrap();
        let (on_a, on_b, on_c) = (upload(&a), upload(&b), upload(&c));
        let operand = |slice, turned: bool, rows, columns| {
            let stride = if turned { columns } else { rows };
            Operand { transposed: turned, ..Operand::wide(gpu.address(slice), stride) }
        };
        let operands =
            [operand(&on_a, turned[0], m, k), operand(&on_b, turned[1], k, n), operand(&on_c, false, m, n)];
        gpu.gemm_in_parts((m, n, k), (3.0, 2.0), operands).unwrap();
        gpu.synchronize().unwrap();
        let got: Vec<f32> = gpu.download(&on_c.slice(..)).unwrap();
        let at = |values: &[f32], turned: bool, (i, j): (usize, usize), (rows, columns)| {
            values[if turned { i * columns + j } else { j * rows + i }] as f64
        };
        let mut largest = 0f64;
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let terms = |p| at(&a, turned[0], (i, p), (m, k)) * at(&b, turned[1], (p, j), (k, n));
            let before = c[j * m + i] as f64;
            let sum = 3.0 * (0..k).map(terms).sum::<f64>() + 2.0 * before;
            let size = 3.0 * (0..k).map(|p| terms(p).abs()).sum::<f64>() + 2.0 * before.abs();
            largest = largest.max((got[j * m + i] as f64 - sum).abs() / size);
        }
        largest
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn products_in_parts_are_as_exact_as_f32() {
        for gpu in gpus() {
            for sizes in [(64, 96, 128), (132, 77, 1500), (512, 8, 2048), (36, 50, 33)] {
                for turned in [[false, false], [true, false], [false, true], [true, true]] {
                    let error = error(&gpu, sizes, turned);
                    assert!(error < 4e-6, "{sizes:?}, turned {turned:?}: {error:.1e}");
                    println!("{sizes:?}, turned {turned:?}: {error:.1e}");
                }
            }
        }
    }
}
