//! Inner loops, compiled once per instruction set and chosen when the program runs.

use multiversion::multiversion;

use super::block::{Columns, LANES};

/// Bytes from what a loop reads to what it asks memory for, so that it arrives in time. Processors do so by themselves, but
/// begin anew with every page of 4096 bytes.
#[cfg(target_arch = "x86_64")]
const FAR: usize = 4096;

/// Bytes to what it asks the second-level cache for, which has it by then.
const NEAR: usize = 1024;

/// Asks for the lines some way ahead of `place`, which a loop reads now; beyond the end of what it reads is no harm.
#[inline(always)]
pub(crate) fn read_ahead<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing is read: an address that no memory belongs to is ignored.
    unsafe {
        // The first-level cache can wait for few lines at a time, the second-level one for many.
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(
            place.wrapping_byte_add(FAR).cast(),
        );
    }
    prefetch(place.wrapping_byte_add(NEAR));
}

/// Asks for the line at `place`, which may lie outside of the program's memory.
#[inline(always)]
pub(crate) fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// `sum_i a[i] * b[i]` in f32, over 4 x 16 independent sums.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const STEP: usize = 4 * LANES;
    let length = a.len().min(b.len());
    let (a, b) = (&a[..length], &b[..length]);
    let mut sums = [0f32; STEP];
    let (blocks_a, blocks_b) = (a.chunks_exact(STEP), b.chunks_exact(STEP));
    let tail: f32 = blocks_a.remainder().iter().zip(blocks_b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in blocks_a.zip(blocks_b) {
        for lane in 0..STEP {
            sums[lane] = x[lane].mul_add(y[lane], sums[lane]);
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `y[i] += a * x[i]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(a, *y);
    }
}

/// The largest value, or minus infinity where there is none.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn maximum(x: &[f32]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let blocks = x.chunks_exact(LANES);
    let tail = blocks.remainder().iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    for block in blocks {
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(block[lane]);
        }
    }
    largest.iter().fold(tail, |a, b| a.max(*b))
}

/// `x[i] = exp(x[i] - shift)`, returning the sum. Relative error below 2e-7 for arguments above -87;
/// smaller ones give 0.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn exp_in_place(x: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let mut blocks = x.chunks_exact_mut(LANES);
    for block in &mut blocks {
        for lane in 0..LANES {
            block[lane] = exp(block[lane] - shift);
            sums[lane] += block[lane];
        }
    }
    let mut tail = 0.0;
    for value in blocks.into_remainder() {
        *value = exp(*value - shift);
        tail += *value;
    }
    sums.iter().sum::<f32>() + tail
}

/// In 16 columns from `first` on, scores become the exponentials of what they are below a column's largest; returns the
/// columns' sums. As in [`exp_in_place`] rows are summed up modulo 16, and those from `whole` on, of a column's own, apart.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn exp_columns(scores: &mut [Columns], first: usize, whole: [usize; LANES]) -> [f32; LANES] {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for row in scores.iter() {
        let row = &row[first..][..LANES];
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(row[lane]);
        }
    }
    let common = whole.iter().fold(usize::MAX, |a, b| a.min(*b)).min(scores.len()) / LANES * LANES;
    let whole = whole.map(|whole| (whole - common) as u32);
    let (common, edge) = scores.split_at_mut(common);
    let (mut sums, mut rest) = ([[0f32; LANES]; LANES], [0f32; LANES]);
    for rows in common.chunks_exact_mut(LANES) {
        for (row, sums) in rows.iter_mut().zip(&mut sums) {
            let row = &mut row[first..][..LANES];
            for lane in 0..LANES {
                row[lane] = exp(row[lane] - largest[lane]);
                sums[lane] += row[lane];
            }
        }
    }
    for (i, row) in edge.iter_mut().enumerate() {
        let (row, sums) = (&mut row[first..][..LANES], &mut sums[i % LANES]);
        for lane in 0..LANES {
            let inside = (i as u32) < whole[lane];
            row[lane] = exp(row[lane] - largest[lane]);
            sums[lane] += if inside { row[lane] } else { 0.0 };
            rest[lane] += if inside { 0.0 } else { row[lane] };
        }
    }
    std::array::from_fn(|lane| sums.iter().map(|sums| sums[lane]).sum::<f32>() + rest[lane])
}

/// `rows[i][c] *= factors[c]`, for as many columns as there are factors.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn scale_columns(rows: &mut [Columns], factors: &[f32]) {
    for row in rows {
        row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
    }
}

/// `x[i] = cap tanh(x[i] / cap)`, with a relative error below 4e-7.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

/// Signed codes to f32, times their scale.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(crate) fn widen_codes(codes: &[i8], scale: f32, out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = *code as f32 * scale;
    }
}

/// `exp(x) = 2^n * exp(r)` with `n = round(x / ln 2)` and a polynomial on `|r| <= ln(2) / 2`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let (r, p, power) = parts_of_exp(x);
    if x < -87.0 { 0.0 } else { r.mul_add(p, 1.0) * power }
}

/// `m / (m + 2)` with `m = exp(2 x) - 1`, of which nothing cancels near 0.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let (r, p, power) = parts_of_exp(2.0 * x.abs());
    let m = (r * p).mul_add(power, power - 1.0);
    (m / (m + 2.0)).copysign(x)
}

/// `r`, `(exp(r) - 1) / r` and `2^n`.
#[inline(always)]
fn parts_of_exp(x: f32) -> (f32, f32, f32) {
    // ln 2 in two parts, so that `x - n * ln 2` keeps its last bits (Cody and Waite).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer that then lies in the low mantissa bits.
    const ROUNDER: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // Taylor's series to the sixth power: the rest is below 2e-8 on this interval.
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    (r, p, power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library() {
        let inputs: Vec<f32> = (0..20_000).map(|i| -90.0 + i as f32 * 0.0089).collect();
        let mut outputs = inputs.clone();
        exp_in_place(&mut outputs, 0.0);
        for (x, y) in inputs.iter().zip(&outputs) {
            let expected = (*x as f64).exp();
            if *x < -87.0 {
                assert_eq!(*y, 0.0);
            } else {
                assert!((*y as f64 - expected).abs() <= 3e-7 * expected, "exp({x}) = {y}, not {expected}");
            }
        }
    }

    #[test]
    fn a_soft_cap_is_exact_near_zero_and_at_its_ends() {
        for cap in [30.0f32, 50.0] {
            let inputs: Vec<f32> = (-400..=400).map(|i| (i as f32 / 100.0).powi(5)).collect();
            let mut outputs = inputs.clone();
            soft_cap(&mut outputs, cap);
            for (x, y) in inputs.iter().zip(&outputs) {
                let expected = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                let error = (f64::from(*y) - expected).abs();
                assert!(error <= 4e-7 * expected.abs(), "{cap} tanh({x} / {cap}) = {y}, not {expected}");
            }
        }
    }

    #[test]
    fn columns_that_end_anywhere_are_summed_up_to_the_bits_of_each_alone() {
        for rows in [1, 15, 16, 40, 100] {
            let row = |i: usize| Columns(std::array::from_fn(|c| ((i * 31 + c * 17) % 97) as f32 / 8.0));
            let mut all: Vec<_> = (0..rows).map(row).collect();
            // What a column does not have is minus infinity.
            let length = |lane: usize| rows.saturating_sub(lane).max(1);
            for (i, row) in all.iter_mut().enumerate() {
                (0..LANES)
                    .filter(|lane| i >= length(*lane))
                    .for_each(|lane| row[16 + lane] = f32::NEG_INFINITY);
            }
            let before = all.clone();
            let sums = exp_columns(&mut all, 16, std::array::from_fn(|lane| length(lane) / LANES * LANES));
            for lane in 0..LANES {
                let scores: Vec<f32> = before[..length(lane)].iter().map(|row| row[16 + lane]).collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let expected: f64 = scores.iter().map(|x| f64::from(x - largest).exp()).sum();
                assert!(
                    (f64::from(sums[lane]) - expected).abs() <= 1e-6 * expected,
                    "{rows} rows, lane {lane}"
                );
                let mut alone = scores;
                assert_eq!(exp_in_place(&mut alone, largest).to_bits(), sums[lane].to_bits());
                let column: Vec<f32> = all.iter().map(|row| row[16 + lane]).collect();
                assert!(column[..alone.len()] == alone && column[alone.len()..].iter().all(|x| *x == 0.0));
            }
            assert!(all.iter().zip(&before).all(|(a, b)| a[..16] == b[..16] && a[32..] == b[32..]), "beside");
        }
    }

    #[test]
    fn tails_are_counted_for_every_length() {
        for length in 0..150 {
            let a: Vec<f32> = (0..length).map(|i| (i % 7) as f32).collect();
            let expected: f32 = a.iter().map(|x| x * x).sum();
            assert_eq!(dot(&a, &a), expected);
            let mut y = a.clone();
            axpy(2.0, &a, &mut y);
            assert!(y.iter().zip(&a).all(|(y, x)| *y == 3.0 * x));
            assert_eq!(maximum(&a), if length == 0 { f32::NEG_INFINITY } else { (length - 1).min(6) as f32 });
            let mut ones = vec![1.0; length];
            assert_eq!(exp_in_place(&mut ones, 1.0), length as f32);
        }
    }
}
