//! Which version of a product fits the processor, the width of the codes and the number of tokens.

use super::fixed::Block;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{Isa, Lanes, PANEL, Task, portable};
#[cfg(target_arch = "x86_64")]
use super::{UNPACKED, amx, avx2, avx512};

pub(super) type Arrange = unsafe fn(&mut [i32]);
type Place = fn(&[i32], usize, &mut [i32]);
pub(super) type Multiply = unsafe fn(&Task, &mut [[f32; PANEL]]);
type MultiplyRun = unsafe fn(&Task, (usize, usize), &[Block], &mut [[f32; PANEL]]);

/// Who multiplies: one block of tokens after the other, or one run of all blocks.
#[derive(Clone, Copy)]
enum Multiplied {
    Block(Multiply),
    Blocks(MultiplyRun),
}

/// The inner loops for one width and one number of tokens.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    tokens: usize,
    gather: unsafe fn(&[f32], &[u32], &mut [f32]),
    arrange: Arrange,
    place: Place,
    multiply: Multiplied,
    unpack: unsafe fn(&[Lanes], &mut [Lanes]),
}

impl Kernels {
    /// For codes of `bits`, or of [`super::UNPACKED`], and `tokens` of [`super::fixed::tokens`]' numbers. `isa` must be one
    /// of those that the processor has.
    pub fn of(isa: Isa, bits: usize, tokens: usize) -> Self {
        macro_rules! width {
            ($set:ident, $bits:literal) => {
                Self {
                    tokens,
                    gather: $set::gather,
                    arrange: as_they_are,
                    place: token_by_token,
                    multiply: Multiplied::Block(match tokens {
                        1 => $set::multiply::<$bits, 1>,
                        2 => $set::multiply::<$bits, 2>,
                        4 => $set::multiply::<$bits, 4>,
                        8 => $set::multiply::<$bits, 8>,
                        _ => $set::multiply::<$bits, 12>,
                    }),
                    unpack: $set::unpack::<$bits>,
                }
            };
        }
        macro_rules! set {
            ($set:ident) => {
                match bits {
                    2 => width!($set, 2),
                    3 => width!($set, 3),
                    4 => width!($set, 4),
                    8 => width!($set, 8),
                    _ => width!($set, 16),
                }
            };
        }
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if bits == UNPACKED => {
                Self { multiply: Multiplied::Blocks(amx::multiply), place: amx::place, ..set!(avx512) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                let unpack = match bits {
                    2 => amx::quads::<2>,
                    3 => amx::quads::<3>,
                    4 => amx::quads::<4>,
                    _ => amx::quads::<8>,
                };
                Self { unpack, ..Self::of(Isa::Avx512, bits, tokens) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => match avx512::of_bytes(bits, tokens) {
                Some((arrange, multiply)) => {
                    Self { arrange, multiply: Multiplied::Block(multiply), ..set!(avx512) }
                }
                None => set!(avx512),
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => set!(avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => set!(neon),
            Isa::Portable => set!(portable),
        }
    }

    /// `values[i] = x[order[i]]`
    pub fn gather(&self, x: &[f32], order: &[u32], values: &mut [f32]) {
        assert_eq!(order.len(), values.len());
        // SAFETY: `isa` chose instructions that the processor has.
        unsafe { (self.gather)(x, order, values) }
    }

    /// Puts one token's pairs of features in the order in which [`Self::multiply`] wants them.
    pub fn arrange(&self, pairs: &mut [i32]) {
        // SAFETY: `isa` chose instructions that the processor has.
        unsafe { (self.arrange)(pairs) }
    }

    /// Puts all tokens of a block, `[tokens, pairs]`, where [`Self::multiply`] wants them.
    pub fn place(&self, rows: &[i32], pairs: usize, places: &mut [i32]) {
        (self.place)(rows, pairs, places);
    }

    /// For every token `t` of the blocks and row of the panel, with the sums over `k` in integers:
    /// `y[t][row] += sum over runs of scale[row] step[t] (sum_k code[row, k] x[t, k] - zero[row] sum_k x[t, k])`.
    /// The first of `task`'s runs is run `r` of the blocks, which have `at` pairs before it.
    pub fn multiply(&self, task: &Task, (at, r): (usize, usize), blocks: &[Block], y: &mut [[f32; PANEL]]) {
        assert_eq!(y.len(), blocks.len() * self.tokens);
        // SAFETY: `isa` chose instructions that the processor has.
        unsafe {
            match self.multiply {
                Multiplied::Block(multiply) => {
                    for (block, y) in blocks.iter().zip(y.chunks_exact_mut(self.tokens)) {
                        let x = &block.x[at * self.tokens..];
                        let (totals, steps) =
                            (&block.totals[r * self.tokens..], &block.steps[r * self.tokens..]);
                        multiply(&Task { x, totals, steps, ..*task }, y);
                    }
                }
                Multiplied::Blocks(multiply) => multiply(task, (at, r), blocks, y),
            }
        }
    }

    /// Words of packed codes to one pair of codes a word.
    pub fn unpack(&self, words: &[Lanes], pairs: &mut [Lanes]) {
        // SAFETY: as above.
        unsafe { (self.unpack)(words, pairs) }
    }
}

/// Most kernels take the same pair of all tokens, then the next one.
fn token_by_token(rows: &[i32], pairs: usize, places: &mut [i32]) {
    let tokens = places.len() / pairs.max(1);
    for (i, x) in places.chunks_exact_mut(tokens.max(1)).enumerate() {
        x.iter_mut().enumerate().for_each(|(t, x)| *x = rows[t * pairs + i]);
    }
}

/// Most kernels take pairs of integers of 16 bits.
fn as_they_are(_: &mut [i32]) {}
