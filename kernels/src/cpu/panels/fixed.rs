//! Activations as integers of 16 bits: every token's features of a run have a step of their own, a 32767th of the
//! largest of them.

use multiversion::multiversion;

use super::{DIRECT, Panels, Parts, RUN, Run, pairs_in_word, team};

/// Tokens of a block where there are many.
pub(super) const BLOCK: usize = 12;

/// Some tokens as the kernels want them.
pub(super) struct Block {
    /// Row of the first.
    pub first: usize,
    /// How many, those included that fill up the block.
    pub tokens: usize,
    /// `[words, pairs in a word, tokens]`
    pub x: Vec<i32>,
    /// `[runs, tokens]`
    pub totals: Vec<i32>,
    /// `[runs, tokens]`
    pub steps: Vec<f32>,
}

/// The numbers of tokens that there are kernels for: the least that holds `rows`.
fn tokens(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=8 => 8,
        _ => BLOCK,
    }
}

/// The rows of x, `[rows, in]`, as one block where they are few, else in blocks of [`BLOCK`].
pub(super) fn fixed(weight: &Panels, x: &[f32], rows: usize) -> Vec<Block> {
    let largest = if rows <= DIRECT { DIRECT } else { BLOCK };
    let mut blocks: Vec<_> = (0..rows)
        .step_by(largest)
        .map(|first| Block::new(weight, first, tokens((rows - first).min(largest))))
        .collect();
    let k = weight.dims.1;
    let fill = |block: &mut Block| {
        let x = &x[block.first * k..rows.min(block.first + block.tokens) * k];
        block.fill(weight, x);
    };
    match &mut blocks[..] {
        [block] => fill(block),
        blocks => {
            let parts = Parts::of(blocks);
            // SAFETY: every block is filled by one thread.
            team::for_each(rows.div_ceil(largest), |i| unsafe { parts.part(i, 1) }.iter_mut().for_each(fill));
        }
    }
    blocks
}

impl Block {
    fn new(weight: &Panels, first: usize, tokens: usize) -> Self {
        let runs = weight.runs.len();
        let x = vec![0; weight.words * pairs_in_word(weight.bits) * tokens];
        Self { first, tokens, x, totals: vec![0; runs * tokens], steps: vec![0.0; runs * tokens] }
    }

    fn fill(&mut self, weight: &Panels, x: &[f32]) {
        let (k, tokens, pairs) = (weight.dims.1, self.tokens, weight.words * pairs_in_word(weight.bits));
        if tokens == 1 {
            (self.steps, self.totals) = integers(weight, x, &mut self.x);
            return;
        }
        let mut rows = vec![0; tokens * pairs];
        for (t, (x, row)) in x.chunks_exact(k).zip(rows.chunks_exact_mut(pairs)).enumerate() {
            let (steps, totals) = integers(weight, x, row);
            for (r, (step, total)) in steps.into_iter().zip(totals).enumerate() {
                (self.steps[r * tokens + t], self.totals[r * tokens + t]) = (step, total);
            }
        }
        for (i, x) in self.x.chunks_exact_mut(tokens).enumerate() {
            x.iter_mut().enumerate().for_each(|(t, x)| *x = rows[t * pairs + i]);
        }
    }
}

/// One token's integers, two to a pair, with the steps and the sums of its runs. Pairs beyond a run's columns stay as
/// they are.
fn integers(weight: &Panels, x: &[f32], pairs: &mut [i32]) -> (Vec<f32>, Vec<i32>) {
    let mut values = [0.0; RUN];
    let one = |run: &Run| {
        let values = &mut values[..run.columns.len()];
        match &weight.order {
            Some(order) => {
                let order = &order[run.columns.clone()];
                values.iter_mut().zip(order).for_each(|(value, i)| *value = x[*i as usize]);
            }
            None => values.copy_from_slice(&x[run.columns.clone()]),
        }
        let halves = bytemuck::cast_slice_mut(&mut pairs[run.at * pairs_in_word(weight.bits)..]);
        round(values, halves)
    };
    weight.runs.iter().map(one).unzip()
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
