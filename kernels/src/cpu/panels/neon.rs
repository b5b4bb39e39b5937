//! The product with NEON, which every aarch64 processor has: codes of 8 rows fill a register, first and second ones of their
//! pairs apart, and are multiplied by lanes of another that holds activations.

use std::arch::aarch64::*;

pub(super) use super::portable::{gather, unpack};
use super::{Lanes, PANEL, Run, Scales, Task, Zeros, mask, pairs_in_word};
use crate::cpu::neon::widen_f16;

/// Rows whose codes fill a register.
const OCTET: usize = 8;

/// Tokens whose pairs of activations fill a register.
const TOKENS: usize = 4;

/// Sums, or what they are multiplied by, of an octet.
type Pair<T> = [T; 2];

/// See [`super::Kernels::multiply`].
///
/// # Safety
/// The processor must have the instructions.
#[target_feature(enable = "neon")]
pub(super) unsafe fn multiply<const BITS: usize, const T: usize>(task: &Task, y: &mut [[f32; PANEL]]) {
    for (r, run) in task.runs.iter().enumerate() {
        // As many octets together as leave registers for more than sums: 8 to 24 of the 32 hold these.
        match T {
            1 | 2 => add_run::<BITS, T, 4>(task, r, run, y),
            4 => add_run::<BITS, T, 2>(task, r, run, y),
            _ => add_run::<BITS, T, 1>(task, r, run, y),
        }
    }
}

/// One run of all rows, `OCTETS` octets at a time.
#[inline]
#[target_feature(enable = "neon")]
fn add_run<const BITS: usize, const T: usize, const OCTETS: usize>(
    task: &Task,
    r: usize,
    run: &Run,
    y: &mut [[f32; PANEL]],
) {
    let (totals, steps, y) = (&task.totals[r * T..][..T], &task.steps[r * T..][..T], &mut y[..T]);
    let stride = pairs_in_word(BITS) * T;
    let x = &task.x[run.at * stride..][..run.words * stride];
    for first in (0..PANEL).step_by(OCTETS * OCTET) {
        let mut sums = [[[vdupq_n_s32(0); 2]; OCTETS]; T];
        for o in 0..OCTETS {
            let zeros = zeros(&task.zeros, run.group, first + o * OCTET);
            for t in 0..T {
                sums[t][o] = zeros.map(|zeros| vmulq_n_s32(zeros, -totals[t]));
            }
        }
        for (words, x) in task.codes[run.at..][..run.words].iter().zip(x.chunks_exact(stride)) {
            let mut halves = [uint16x8x2_t(vdupq_n_u16(0), vdupq_n_u16(0)); OCTETS];
            for o in 0..OCTETS {
                halves[o] = load(words, first + o * OCTET);
            }
            for (i, x) in x.chunks_exact(T).enumerate() {
                for o in 0..OCTETS {
                    let codes = [halves[o].0, halves[o].1].map(|half| field::<BITS>(half, i));
                    for (x, sums) in x.chunks(TOKENS).zip(sums.chunks_mut(TOKENS)) {
                        let x = tokens(x);
                        for (t, sums) in sums.iter_mut().enumerate() {
                            sums[o] = add_pair(sums[o], codes, x, t);
                        }
                    }
                }
            }
        }
        for o in 0..OCTETS {
            let scales = scales(&task.scales, run.group, first + o * OCTET);
            for t in 0..T {
                for half in 0..2 {
                    let place = y[t][first + o * OCTET + 4 * half..][..4].as_mut_ptr();
                    let scale = vmulq_n_f32(scales[half], steps[t]);
                    // SAFETY: 4 values from `place` on.
                    unsafe {
                        vst1q_f32(place, vfmaq_f32(vld1q_f32(place), vcvtq_f32_s32(sums[t][o][half]), scale))
                    };
                }
            }
        }
    }
}

/// The low halves of the words of an octet from row `first` on, and the high ones.
#[inline]
#[target_feature(enable = "neon")]
fn load(words: &Lanes, first: usize) -> uint16x8x2_t {
    let place = words.0[first..][..OCTET].as_ptr();
    // SAFETY: 8 words from `place` on.
    unsafe { vld2q_u16(place.cast()) }
}

/// Code `i` of every half of a word.
#[inline]
#[target_feature(enable = "neon")]
fn field<const BITS: usize>(half: uint16x8_t, i: usize) -> int16x8_t {
    let shifted = vshlq_u16(half, vdupq_n_s16(-((BITS * i) as i16)));
    vreinterpretq_s16_u16(vandq_u16(shifted, vdupq_n_u16(mask(BITS) as u16)))
}

/// Up to [`TOKENS`] pairs, in the low lanes.
#[inline]
#[target_feature(enable = "neon")]
fn tokens(x: &[i32]) -> int16x8_t {
    let mut lanes = [0; TOKENS];
    lanes[..x.len()].copy_from_slice(x);
    // SAFETY: 4 pairs.
    vreinterpretq_s16_s32(unsafe { vld1q_s32(lanes.as_ptr()) })
}

/// Adds an octet's first codes times the first of pair `t` of `x`, and second ones times the second.
#[inline]
#[target_feature(enable = "neon")]
fn add_pair(sums: Pair<int32x4_t>, codes: Pair<int16x8_t>, x: int16x8_t, t: usize) -> Pair<int32x4_t> {
    match t {
        0 => add_lane::<1>(add_lane::<0>(sums, codes[0], x), codes[1], x),
        1 => add_lane::<3>(add_lane::<2>(sums, codes[0], x), codes[1], x),
        2 => add_lane::<5>(add_lane::<4>(sums, codes[0], x), codes[1], x),
        _ => add_lane::<7>(add_lane::<6>(sums, codes[0], x), codes[1], x),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn add_lane<const LANE: i32>(
    [low, high]: Pair<int32x4_t>,
    codes: int16x8_t,
    x: int16x8_t,
) -> Pair<int32x4_t> {
    [vmlal_laneq_s16::<LANE>(low, vget_low_s16(codes), x), vmlal_high_laneq_s16::<LANE>(high, codes, x)]
}

/// Zero points of an octet from row `first` on.
#[inline]
#[target_feature(enable = "neon")]
fn zeros(zeros: &Zeros, group: usize, first: usize) -> Pair<int32x4_t> {
    match zeros {
        Zeros::Same(zero) => [vdupq_n_s32(i32::from(*zero)); 2],
        Zeros::Each(zeros) => {
            let place = zeros[group][first..][..OCTET].as_ptr();
            // SAFETY: 8 values from `place` on.
            let zeros = unsafe { vld1q_u16(place) };
            [vmovl_u16(vget_low_u16(zeros)), vmovl_high_u16(zeros)].map(|zeros| vreinterpretq_s32_u32(zeros))
        }
    }
}

/// Scales of an octet from row `first` on.
#[inline]
#[target_feature(enable = "neon")]
fn scales(scales: &Scales, group: usize, first: usize) -> Pair<float32x4_t> {
    // SAFETY: 8 values from each place on.
    unsafe {
        match scales {
            Scales::F16(scales) => {
                let place = scales[group][first..][..OCTET].as_ptr();
                [place, place.add(4)].map(|part| widen_f16(vld1_u16(part.cast())))
            }
            Scales::F32(scales) => {
                let place = scales[group][first..][..OCTET].as_ptr();
                [vld1q_f32(place), vld1q_f32(place.add(4))]
            }
        }
    }
}
