//! Activations as integers of 16 bits: every token's features of a run have a step of their own, a 32767th of the
//! largest of them.

use multiversion::multiversion;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::kernels::Kernels;
use super::{DIRECT, Isa, Panels, Parts, RUN, Run, pairs_in_word, team};
use crate::cpu::zeroed;

/// Bytes of a cache line, which is what a row of a tile has.
const LINE: usize = 64;

/// Tokens of a block where there are many.
pub(super) const fn block(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::TOKENS,
        _ => 12,
    }
}

/// All tokens, a block after the other, each as the kernels want it.
pub(super) struct Blocks {
    /// Of all together.
    tokens: usize,
    /// Of a block, but for the last.
    together: usize,
    /// `[blocks, words, pairs in a word, tokens]`, from where the first cache line begins.
    x: Vec<i32>,
    begins: usize,
    /// `[blocks, runs, tokens]`
    totals: Vec<i32>,
    /// `[blocks, runs, tokens]`
    steps: Vec<f32>,
}

/// Some tokens as the kernels want them.
pub(super) struct Block<'a> {
    /// Row of the first.
    pub first: usize,
    /// How many, those included that fill up the block.
    pub tokens: usize,
    /// `[words, pairs in a word, tokens]`
    pub x: &'a [i32],
    /// `[runs, tokens]`
    pub totals: &'a [i32],
    /// `[runs, tokens]`
    pub steps: &'a [f32],
}

/// The numbers of tokens that there are kernels for where they are few: the least that holds `rows`.
pub(super) fn tokens(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        _ => 8,
    }
}

/// Tokens of the last of many blocks, with those that fill it up.
fn last(isa: Isa, rows: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => block(isa) * rows.min(1),
        _ if rows > DIRECT => block(isa),
        _ => tokens(rows),
    }
}

impl Blocks {
    /// The rows of x, `[rows, in]`, as one block where they are few, else in blocks of [`block`]; as `kernels` want them.
    pub fn of(weight: &Panels, x: &[f32], rows: usize, (isa, kernels): (Isa, &Kernels)) -> Self {
        let (together, tokens) = match rows {
            ..=DIRECT => (tokens(rows), tokens(rows)),
            _ => {
                let (block, rest) = (block(isa), rows % block(isa));
                (block, rows - rest + last(isa, rest))
            }
        };
        let (k, runs, pairs) = (weight.dims.1, weight.runs.len(), weight.words * pairs_in_word(weight.bits));
        let mut all = Self {
            tokens,
            together,
            x: Vec::with_capacity(pairs * tokens + LINE / size_of::<i32>()),
            begins: 0,
            totals: Vec::with_capacity(runs * tokens),
            steps: Vec::with_capacity(runs * tokens),
        };
        all.begins = all.x.as_ptr().align_offset(LINE);
        all.x.resize(all.begins, 0);
        let parts = (
            Parts::of(&mut all.x.spare_capacity_mut()[..pairs * tokens]),
            Parts::of(&mut all.totals.spare_capacity_mut()[..runs * tokens]),
            Parts::of(&mut all.steps.spare_capacity_mut()[..runs * tokens]),
        );
        team::for_each(tokens.div_ceil(together.max(1)), |i| {
            let first = i * together;
            let count = together.min(tokens - first);
            // SAFETY: every block is filled by one thread.
            let (places, totals, steps) = unsafe {
                (
                    parts.0.part(first * pairs, count * pairs),
                    parts.1.part(first * runs, count * runs),
                    parts.2.part(first * runs, count * runs),
                )
            };
            let x = &x[first * k..rows.min(first + count) * k];
            fill(weight, x, (count, kernels), (zeroed(places), zeroed(totals), zeroed(steps)));
        });
        // SAFETY: every block has been filled.
        unsafe {
            all.x.set_len(all.begins + pairs * tokens);
            all.totals.set_len(runs * tokens);
            all.steps.set_len(runs * tokens);
        }
        all
    }

    pub fn iter(&self) -> impl Iterator<Item = Block<'_>> {
        let per = |length: usize| length / self.tokens.max(1);
        let x = &self.x[self.begins..];
        let (pairs, runs) = (per(x.len()), per(self.totals.len()));
        (0..self.tokens).step_by(self.together.max(1)).map(move |first| {
            let tokens = self.together.min(self.tokens - first);
            Block {
                first,
                tokens,
                x: &x[first * pairs..][..tokens * pairs],
                totals: &self.totals[first * runs..][..tokens * runs],
                steps: &self.steps[first * runs..][..tokens * runs],
            }
        })
    }
}

/// Writes a block, which is all zeros, for the rows of `x`.
fn fill(
    weight: &Panels,
    x: &[f32],
    (tokens, kernels): (usize, &Kernels),
    (places, totals, steps): (&mut [i32], &mut [i32], &mut [f32]),
) {
    let (k, pairs) = (weight.dims.1, weight.words * pairs_in_word(weight.bits));
    let mut rows = vec![0; if tokens == 1 { 0 } else { tokens * pairs }];
    for (t, x) in x.chunks_exact(k.max(1)).enumerate() {
        let row = if tokens == 1 { &mut *places } else { &mut rows[t * pairs..][..pairs] };
        integers(weight, x, kernels, row, |r, (step, total)| {
            (steps[r * tokens + t], totals[r * tokens + t]) = (step, total);
        });
        kernels.arrange(row);
    }
    if tokens > 1 {
        kernels.place(&rows, pairs, places);
    }
}

/// One token's integers, two to a pair; `note` gets the step and the sum of each of its runs. Pairs beyond a run's columns
/// stay as they are.
fn integers(
    weight: &Panels,
    x: &[f32],
    kernels: &Kernels,
    pairs: &mut [i32],
    mut note: impl FnMut(usize, (f32, i32)),
) {
    let mut values = [0.0; RUN];
    for (r, run) in weight.runs.iter().enumerate() {
        let Run { columns, at, .. } = run;
        let values = &mut values[..columns.len()];
        match &weight.order {
            Some(order) => kernels.gather(x, &order[columns.clone()], values),
            None => values.copy_from_slice(&x[columns.clone()]),
        }
        let halves = bytemuck::cast_slice_mut(&mut pairs[at * pairs_in_word(weight.bits)..]);
        note(r, round(values, halves));
    }
}

/// Writes the multiples of a step that come nearest to `values`; returns the step and their sum. Where a value is
/// infinite or no number, so is the step.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn round(values: &[f32], integers: &mut [i16]) -> (f32, i32) {
    /// Adding it rounds to an integer, which then stands in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// Below, its reciprocal times 32767 might not be finite.
    const SMALLEST: f32 = 1e-30;
    let largest = values.iter().fold(0, |largest, x| (x.to_bits() & (u32::MAX >> 1)).max(largest));
    let largest = f32::from_bits(largest);
    let (step, rate) = match largest {
        x if !x.is_finite() => (f32::NAN, 0.0),
        x if x < SMALLEST => (0.0, 0.0),
        x => (x / 32767.0, 32767.0 / x),
    };
    let mut total = 0;
    for (integer, x) in integers.iter_mut().zip(values) {
        let nearest = (x * rate + ROUNDER).to_bits() as i16;
        *integer = nearest;
        total += i32::from(nearest);
    }
    (step, if largest.is_finite() { total } else { 0 })
}
