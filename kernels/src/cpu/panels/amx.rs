//! The product of many tokens with AMX: tiles of 16 tokens and 64 features times tiles of as many features and 16 rows, in
//! bytes. An activation is its high byte, which has a sign, times 256 and its low byte, which has none; so sums are the
//! integers that they are in every other version.
//!
//! Four features are a word, the firsts of two pairs before the seconds.

use std::arch::asm;
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::avx512::{add, scales, times};
use super::{Lanes, PANEL, Task, pairs_in_word};

/// Tokens of a block.
pub(super) const TOKENS: usize = 16;

/// Pairs of features of a step.
pub(super) const STEP: usize = 32;

/// Words of a tile.
const TILE: usize = 256;

/// Sums of low and of high bytes, for the first and the second half of a panel's rows.
#[repr(align(64))]
struct Sums([[[i32; 16]; TOKENS]; 4]);

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    reserved: [u8; 15],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes, in every thread that multiplies.
fn configure() {
    thread_local!(static READY: Cell<bool> = const { Cell::new(false) });
    if READY.get() {
        return;
    }
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(16);
    let shapes = Shapes { palette: 1, reserved: [0; 15], row_bytes, rows };
    // SAFETY: only kernels of `Isa::Amx` come here, so the processor has AMX; the instruction reads 64 bytes, which
    // `Shapes` has.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags)) };
    READY.set(true);
}

/// See [`super::Kernels::multiply`]. `codes` are those that [`quads`] makes, `x` what [`place`] makes.
///
/// # Safety
/// The processor must have the instructions, runs must be whole steps, and tokens as many as a block has.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(task: &Task, y: &mut [[f32; PANEL]]) {
    configure();
    for (r, run) in task.runs.iter().enumerate() {
        let codes = task.codes[run.at / 2..][..run.words / 2].chunks_exact(STEP / 2);
        let x = task.x[run.at * TOKENS..][..run.words * TOKENS].chunks_exact(2 * TILE);
        let mut sums = MaybeUninit::<Sums>::uninit();
        // SAFETY: a step's tiles lie in `codes` and `x`, and results fill `sums`; nothing else uses tiles.
        let sums = unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
            for (codes, x) in codes.zip(x) {
                asm!(
                    "tileloadd tmm4, [{x} + {line} + 1024]",
                    "tileloadd tmm6, [{codes} + 2*{line}]",
                    "tdpbuud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{codes} + 2*{line} + 64]",
                    "tdpbuud tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x} + {line}]",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    x = in(reg) x.as_ptr(),
                    codes = in(reg) codes.as_ptr(),
                    line = in(reg) 64usize,
                    options(nostack, readonly, preserves_flags)
                );
            }
            asm!(
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 3072], tmm3",
                sums = in(reg) sums.as_mut_ptr(),
                line = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
            sums.assume_init_ref()
        };
        add_sums(task, r, sums, y);
    }
}

/// y += the sums of run `r`, less those of its zero points, times scale and step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_sums(task: &Task, r: usize, sums: &Sums, y: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::{_mm512_add_epi32, _mm512_loadu_si512, _mm512_slli_epi32};
    let (totals, steps) = (&task.totals[r * TOKENS..][..TOKENS], &task.steps[r * TOKENS..][..TOKENS]);
    let group = task.runs[r].group;
    let scales = scales(&task.scales, group);
    for (t, y) in y.iter_mut().enumerate() {
        let zeros = times(-totals[t], &task.zeros, group);
        for half in 0..2 {
            let [low, high] = [half, 2 + half].map(|part| {
                // SAFETY: 16 sums from there on.
                unsafe { _mm512_loadu_si512(sums.0[part][t].as_ptr().cast()) }
            });
            let sum = _mm512_add_epi32(_mm512_add_epi32(zeros[half], low), _mm512_slli_epi32::<8>(high));
            add(&mut y[16 * half..][..16], sum, scales[half], steps[t]);
        }
    }
}

/// Words of packed codes to words of four codes each, half as many as pairs.
pub(super) fn quads<const BITS: usize>(words: &[Lanes], quads: &mut [Lanes]) {
    let (fields, mask) = (pairs_in_word(BITS) / 2, super::mask(BITS));
    for (words, quads) in words.iter().zip(quads.chunks_exact_mut(fields)) {
        for (i, quads) in quads.iter_mut().enumerate() {
            for (quad, word) in quads.0.iter_mut().zip(&words.0) {
                let pair = |i: usize| word >> (BITS * i) & mask;
                *quad = pair(2 * i) | pair(2 * i + 1) << 8;
            }
        }
    }
}

/// A block's tokens, `[tokens, pairs]`, step by step: the high bytes of each token, then the low ones.
pub(super) fn place(rows: &[i32], pairs: usize, places: &mut [i32]) {
    const BYTES: i32 = 0x00FF_00FF;
    for (s, places) in places.chunks_exact_mut(2 * TILE).enumerate() {
        let (high, low) = places.split_at_mut(TILE);
        let tokens = high.chunks_exact_mut(STEP / 2).zip(low.chunks_exact_mut(STEP / 2));
        for (row, (high, low)) in rows.chunks_exact(pairs).zip(tokens) {
            let pairs = row[s * STEP..][..STEP].as_chunks::<2>().0;
            for (([first, second], high), low) in pairs.iter().zip(high).zip(low) {
                *high = (first >> 8 & BYTES) | (second & !BYTES);
                *low = (first & BYTES) | (second & BYTES) << 8;
            }
        }
    }
}
