//! Which version of a product fits the processor, the width of the codes and the number of tokens.

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{Isa, Lanes, PANEL, Task, portable};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

pub(super) type Arrange = unsafe fn(&mut [i32]);
pub(super) type Multiply = unsafe fn(&Task, &mut [[f32; PANEL]]);

/// The inner loops for one width and one number of tokens.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    tokens: usize,
    arrange: Arrange,
    multiply: Multiply,
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
                    arrange: as_they_are,
                    multiply: match tokens {
                        1 => $set::multiply::<$bits, 1>,
                        2 => $set::multiply::<$bits, 2>,
                        4 => $set::multiply::<$bits, 4>,
                        8 => $set::multiply::<$bits, 8>,
                        _ => $set::multiply::<$bits, 12>,
                    },
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
            Isa::Avx512 => match avx512::of_bytes(bits, tokens) {
                Some((arrange, multiply)) => Self { arrange, multiply, ..set!(avx512) },
                None => set!(avx512),
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => set!(avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => set!(neon),
            Isa::Portable => set!(portable),
        }
    }

    /// Puts one token's pairs of features in the order in which [`Self::multiply`] wants them.
    pub fn arrange(&self, pairs: &mut [i32]) {
        // SAFETY: `isa` chose instructions that the processor has.
        unsafe { (self.arrange)(pairs) }
    }

    /// For every token `t` and row of the panel, with the sums over `k` in integers:
    /// `y[t][row] += sum over runs of scale[row] step[t] (sum_k code[row, k] x[t, k] - zero[row] sum_k x[t, k])`.
    pub fn multiply(&self, task: &Task, y: &mut [[f32; PANEL]]) {
        assert_eq!(y.len(), self.tokens);
        // SAFETY: `isa` chose instructions that the processor has.
        unsafe { (self.multiply)(task, y) }
    }

    /// Words of packed codes to one pair of codes a word.
    pub fn unpack(&self, words: &[Lanes], pairs: &mut [Lanes]) {
        // SAFETY: as above.
        unsafe { (self.unpack)(words, pairs) }
    }
}

/// Most kernels take pairs of integers of 16 bits.
fn as_they_are(_: &mut [i32]) {}
