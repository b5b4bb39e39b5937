//! The product of many tokens with AMX: tiles of 16 tokens and 64 features times tiles of as many features and 16 rows, in
//! bytes. An activation is its high byte, which has a sign, times 256 and its low byte, which has none; so sums are the
//! integers that they are in every other version.
//!
//! Four features are a word, the firsts of two pairs before the seconds.

use std::arch::asm;
use std::arch::x86_64::{__m512, _mm512_add_epi32, _mm512_load_si512, _mm512_slli_epi32};
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::avx512::{add, scales, times};
use super::fixed::Block;
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

/// See [`super::Kernels::multiply`]; of one run, whose `codes` are those that [`quads`] makes, `x` what [`place`] makes.
///
/// Tiles multiply by themselves. Meanwhile the sums of the block before are scaled; and sums are stored after other
/// products have been asked for, because right after the last of their own the processor would wait.
///
/// # Safety
/// The processor must have the instructions, runs must be whole steps, and tokens as many as a block has.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(
    task: &Task,
    (at, r): (usize, usize),
    blocks: &[Block],
    y: &mut [[f32; PANEL]],
) {
    configure();
    let run = &task.runs[0];
    let codes = &task.codes[..run.words / 2];
    let scales = scales(&task.scales, run.group);
    let mut sums = [const { MaybeUninit::<Sums>::uninit() }; 2];
    let places = sums.each_mut().map(MaybeUninit::as_mut_ptr);
    // SAFETY: nothing else uses tiles; a step's tiles lie in `codes` and `x`, and results fill `sums`, a half of the rows in
    // each call of `store`. What is added was stored.
    unsafe {
        clear::<0>();
        clear::<1>();
        for i in 0..=blocks.len() {
            let (now, before) = (places[i % 2], places[(i + 1) % 2]);
            if let Some(block) = blocks.get(i) {
                let x = &block.x[at * TOKENS..][..run.words * TOKENS];
                for (step, (codes, x)) in
                    codes.chunks_exact(STEP / 2).zip(x.chunks_exact(2 * TILE)).enumerate()
                {
                    load_tokens(x);
                    multiply_half::<0>(codes);
                    if step == 0 {
                        store::<1>(before);
                        clear::<1>();
                    }
                    multiply_half::<1>(codes);
                }
            } else {
                store::<1>(before);
            }
            if let Some(i) = i.checked_sub(1) {
                add_sums((task, scales), (&blocks[i], r), &*before, &mut y[i * TOKENS..][..TOKENS]);
            }
            store::<0>(now);
            clear::<0>();
        }
    }
}

/// Sums of the low and the high bytes for a half of the rows become zeros.
#[inline(always)]
unsafe fn clear<const HALF: usize>() {
    // SAFETY: the caller's tiles.
    unsafe {
        match HALF {
            0 => asm!("tilezero tmm0", "tilezero tmm2", options(nostack, nomem, preserves_flags)),
            _ => asm!("tilezero tmm1", "tilezero tmm3", options(nostack, nomem, preserves_flags)),
        }
    }
}

/// A step of a block's tokens: low and high bytes.
#[inline(always)]
unsafe fn load_tokens(x: &[i32]) {
    debug_assert_eq!(x.len(), 2 * TILE);
    // SAFETY: the caller's tiles; two of them lie in `x`.
    unsafe {
        asm!(
            "tileloadd tmm4, [{x} + {line} + 1024]",
            "tileloadd tmm5, [{x} + {line}]",
            x = in(reg) x.as_ptr(),
            line = in(reg) 64usize,
            options(nostack, readonly, preserves_flags)
        );
    }
}

/// Adds the products of the tokens that are loaded with the codes of a half of the rows.
#[inline(always)]
unsafe fn multiply_half<const HALF: usize>(codes: &[Lanes]) {
    debug_assert_eq!(codes.len(), STEP / 2);
    // SAFETY: the caller's tiles; the half of a row of `codes` is a row of a tile.
    unsafe {
        match HALF {
            0 => asm!(
                "tileloadd tmm6, [{codes} + 2*{line}]",
                "tdpbuud tmm0, tmm4, tmm6",
                "tdpbsud tmm2, tmm5, tmm6",
                codes = in(reg) codes.as_ptr(),
                line = in(reg) 64usize,
                options(nostack, readonly, preserves_flags)
            ),
            _ => asm!(
                "tileloadd tmm7, [{codes} + 2*{line} + 64]",
                "tdpbuud tmm1, tmm4, tmm7",
                "tdpbsud tmm3, tmm5, tmm7",
                codes = in(reg) codes.as_ptr(),
                line = in(reg) 64usize,
                options(nostack, readonly, preserves_flags)
            ),
        }
    }
}

/// Stores the sums for a half of the rows.
#[inline(always)]
unsafe fn store<const HALF: usize>(sums: *mut Sums) {
    // SAFETY: the caller's tiles; `sums` has room for four.
    unsafe {
        match HALF {
            0 => asm!(
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 2048], tmm2",
                sums = in(reg) sums,
                line = in(reg) 64usize,
                options(nostack, preserves_flags)
            ),
            _ => asm!(
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 3072], tmm3",
                sums = in(reg) sums,
                line = in(reg) 64usize,
                options(nostack, preserves_flags)
            ),
        }
    }
}

/// y += the sums of a block and its run `r`, less those of its zero points, times scale and step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_sums(
    (task, scales): (&Task, [__m512; 2]),
    (block, r): (&Block, usize),
    sums: &Sums,
    y: &mut [[f32; PANEL]],
) {
    let tokens = r * TOKENS..(r + 1) * TOKENS;
    let of_tokens = block.totals[tokens.clone()].iter().zip(&block.steps[tokens]);
    for ((t, y), (total, step)) in y.iter_mut().enumerate().zip(of_tokens) {
        let zeros = times(-total, &task.zeros, task.runs[0].group);
        for half in 0..2 {
            // SAFETY: a block has so many tokens, and a token's sums fill a register.
            let [low, high] = [half, 2 + half].map(|part| unsafe {
                _mm512_load_si512(sums.0.get_unchecked(part).get_unchecked(t).as_ptr().cast())
            });
            let sum = _mm512_add_epi32(_mm512_add_epi32(zeros[half], low), _mm512_slli_epi32::<8>(high));
            add(&mut y[16 * half..][..16], sum, scales[half], *step);
        }
    }
}

/// Words of packed codes to words of four codes each, half as many as pairs.
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn quads<const BITS: usize>(words: &[Lanes], quads: &mut [Lanes]) {
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
