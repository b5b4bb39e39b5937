//! The product in plain Rust: what every other version must give, bit for bit.

use super::{Lanes, PANEL, Task, mask, pairs_in_word};

/// See [`super::Kernels::multiply`].
pub(super) fn multiply<const BITS: usize, const T: usize>(task: &Task, y: &mut [[f32; PANEL]]) {
    for (r, run) in task.runs.iter().enumerate() {
        let (scales, zeros) = (task.scales.of(run.group), task.zeros.of(run.group));
        let mut sums = [[0i32; PANEL]; T];
        for (sums, total) in sums.iter_mut().zip(&task.totals[r * T..]) {
            sums.iter_mut().zip(&zeros).for_each(|(sum, zero)| *sum = -total * i32::from(*zero));
        }
        let stride = pairs_in_word(BITS) * T;
        let x = task.x[run.at * stride..].chunks_exact(stride);
        for (words, x) in task.codes[run.at..][..run.words].iter().zip(x) {
            add_word::<BITS, T>(words, x, &mut sums);
        }
        for (t, (y, sums)) in y.iter_mut().zip(&sums).enumerate() {
            let step = task.steps[r * T + t];
            for row in 0..PANEL {
                y[row] = (sums[row] as f32).mul_add(scales[row] * step, y[row]);
            }
        }
    }
}

#[inline(always)]
fn add_word<const BITS: usize, const T: usize>(words: &Lanes, x: &[i32], sums: &mut [[i32; PANEL]; T]) {
    for (i, x) in x.chunks_exact(T).enumerate() {
        for (x, sums) in x.iter().zip(sums.iter_mut()) {
            let (first, second) = (i32::from(*x as i16), *x >> 16);
            for (sum, word) in sums.iter_mut().zip(&words.0) {
                let pair = word >> (BITS * i) & mask(BITS);
                *sum += (pair & 0xFFFF) as i32 * first + (pair >> 16) as i32 * second;
            }
        }
    }
}

/// See [`super::Kernels::gather`].
pub(super) fn gather(x: &[f32], order: &[u32], values: &mut [f32]) {
    values.iter_mut().zip(order).for_each(|(value, i)| *value = x[*i as usize]);
}

/// See [`super::Kernels::unpack`].
pub(super) fn unpack<const BITS: usize>(words: &[Lanes], pairs: &mut [Lanes]) {
    for (words, pairs) in words.iter().zip(pairs.chunks_exact_mut(pairs_in_word(BITS))) {
        for (i, pairs) in pairs.iter_mut().enumerate() {
            let both = pairs.0.iter_mut().zip(&words.0);
            both.for_each(|(pair, word)| *pair = word >> (BITS * i) & mask(BITS));
        }
    }
}
