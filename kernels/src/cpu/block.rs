//! Products of small blocks in f32, their sums in registers: 8 rows by up to 48 columns.
//!
//! With AVX-512 the sums take 24 of 32 registers, and what a step reads is 3 registers and 8 numbers for 24
//! multiplications.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use super::Isa;

/// Rows of a block.
pub(crate) const ROWS: usize = 8;

/// Most columns of a block.
pub(crate) const COLUMNS: usize = 48;

/// Columns of a register; a block has a multiple of them.
pub(crate) const LANES: usize = 16;

/// A number for every column. It begins where a cache line does: a register that is read from two lines takes twice as long.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Columns(pub [f32; COLUMNS]);

impl Deref for Columns {
    type Target = [f32; COLUMNS];

    fn deref(&self) -> &[f32; COLUMNS] {
        &self.0
    }
}

impl DerefMut for Columns {
    fn deref_mut(&mut self) -> &mut [f32; COLUMNS] {
        &mut self.0
    }
}

/// What becomes of what a block's place holds.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Before {
    Dropped,
    Added,
}

/// `y[r][c] = sum_k a[k][first + r] b[k][c]`, for `columns` columns, a multiple of [`LANES`]; rows of `y` are `stride`
/// apart. `isa` must be one of those that the processor has.
pub(crate) fn multiply_block<const WIDTH: usize>(
    (a, first): (&[[f32; WIDTH]], usize),
    b: &[Columns],
    columns: usize,
    (y, stride): (&mut [f32], usize),
    before: Before,
    isa: Isa,
) {
    assert!(columns <= stride && columns <= COLUMNS && columns.is_multiple_of(LANES));
    assert!(y.len() >= (ROWS - 1) * stride + columns && first + ROWS <= WIDTH);
    assert_eq!(a.len(), b.len());
    let a = (a, first);
    match isa {
        // SAFETY: `isa` chose instructions that the processor has, and the lengths are as they must be.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe {
            match columns / LANES {
                0 => {}
                1 => x86::avx512::<1, _>(a, b, y, stride, before),
                2 => x86::avx512::<2, _>(a, b, y, stride, before),
                _ => x86::avx512::<3, _>(a, b, y, stride, before),
            }
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2(a, b, columns, y, stride, before) },
        // The compiler makes vectors of its loops, and every aarch64 processor multiplies and adds in one go.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => parts::<true, _>(a, b, columns, y, stride, before),
        Isa::Portable => parts::<false, _>(a, b, columns, y, stride, before),
    }
}

/// In parts of 4 rows by 16 columns, which fit into the registers of any processor that has vectors.
#[inline(always)]
fn parts<const FUSED: bool, const WIDTH: usize>(
    (a, first_row): (&[[f32; WIDTH]], usize),
    b: &[Columns],
    columns: usize,
    y: &mut [f32],
    stride: usize,
    before: Before,
) {
    const PART: usize = 4;
    for first in (0..columns).step_by(LANES) {
        for row in (0..ROWS).step_by(PART) {
            let mut sums = [[0f32; LANES]; PART];
            for (a, b) in a.iter().zip(b) {
                let (a, b): (&[f32], &[f32]) = (&a[first_row + row..][..PART], &b[first..][..LANES]);
                for r in 0..PART {
                    for lane in 0..LANES {
                        let sum = &mut sums[r][lane];
                        *sum = if FUSED { a[r].mul_add(b[lane], *sum) } else { *sum + a[r] * b[lane] };
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let y = y[(row + r) * stride + first..][..LANES].iter_mut().zip(sums);
                match before {
                    Before::Dropped => y.for_each(|(y, sum)| *y = *sum),
                    Before::Added => y.for_each(|(y, sum)| *y += sum),
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Before, Columns, LANES, ROWS, parts};
    use crate::cpu::prefetch;

    /// Steps from the one that is multiplied to the one that is asked for: data of the second-level cache takes about as long.
    const AHEAD: usize = 12;

    /// `V` registers of columns.
    ///
    /// # Safety
    /// The processor must have the instructions, `a` the columns from `first` on, and `y` the rows.
    // Loops over constants alone are unrolled, so that sums stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512<const V: usize, const WIDTH: usize>(
        (a, first): (&[[f32; WIDTH]], usize),
        b: &[Columns],
        y: &mut [f32],
        stride: usize,
        before: Before,
    ) {
        let mut sums = [[_mm512_setzero_ps(); V]; ROWS];
        for (a, b) in a.iter().zip(b) {
            prefetch(a.as_ptr().wrapping_add(AHEAD * WIDTH + first));
            let mut columns = [_mm512_setzero_ps(); V];
            for v in 0..V {
                prefetch((&raw const *b).wrapping_add(AHEAD).cast::<f32>().wrapping_add(v * LANES));
                // SAFETY: a row of b holds three registers.
                columns[v] = unsafe { _mm512_loadu_ps(b.as_ptr().add(v * LANES)) };
            }
            for r in 0..ROWS {
                // SAFETY: the caller has seen to it that a row of a ends no earlier.
                let a = _mm512_set1_ps(unsafe { *a.get_unchecked(first + r) });
                for v in 0..V {
                    sums[r][v] = _mm512_fmadd_ps(a, columns[v], sums[r][v]);
                }
            }
        }
        for r in 0..ROWS {
            for v in 0..V {
                // SAFETY: the caller has seen to it that y has so many rows of so many columns.
                unsafe {
                    let place = y.as_mut_ptr().add(r * stride + v * LANES);
                    let sum = match before {
                        Before::Dropped => sums[r][v],
                        Before::Added => _mm512_add_ps(_mm512_loadu_ps(place), sums[r][v]),
                    };
                    _mm512_storeu_ps(place, sum);
                }
            }
        }
    }

    /// # Safety
    /// The processor must have the instructions.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const WIDTH: usize>(
        a: (&[[f32; WIDTH]], usize),
        b: &[Columns],
        columns: usize,
        y: &mut [f32],
        stride: usize,
        before: Before,
    ) {
        parts::<true, _>(a, b, columns, y, stride, before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, random};

    #[test]
    fn every_width_and_version_agrees_with_f64_and_leaves_what_is_beside_alone() {
        let stride = COLUMNS + 5;
        for k in [0, 1, 7, 300] {
            const WIDTH: usize = ROWS + 3;
            let (a, b) = (random(1, k * WIDTH), random(2, k * COLUMNS));
            let rows = a.as_chunks::<WIDTH>().0;
            let columns: Vec<_> = b.as_chunks().0.iter().map(|row| Columns(*row)).collect();
            for width in [0, 16, 32, 48] {
                for (before, factor) in [(Before::Dropped, 0.0), (Before::Added, 1.0)] {
                    let start = random(3, ROWS * stride);
                    let expected = |i: usize| {
                        let (r, c) = (i / stride, i % stride);
                        let sum = |k: usize| f64::from(a[k * WIDTH + 2 + r]) * f64::from(b[k * COLUMNS + c]);
                        match c < width {
                            true => factor * f64::from(start[i]) + (0..k).map(sum).sum::<f64>(),
                            false => f64::from(start[i]),
                        }
                    };
                    let expected: Vec<f64> = (0..start.len()).map(expected).collect();
                    for isa in Isa::all() {
                        let mut y = start.clone();
                        multiply_block((rows, 2), &columns, width, (&mut y, stride), before, isa);
                        assert_close(&format!("{k} deep, {width} wide, {isa:?}"), &y, &expected, NMSE_F32);
                    }
                }
            }
        }
    }
}
