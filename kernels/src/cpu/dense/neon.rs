//! The dot products with NEON, two registers taken for one of eight lanes.

use std::arch::aarch64::*;

use super::DenseRow;
use super::registers::{BF16, F16, F32, TOGETHER, dots};
use crate::cpu::neon::widen_f16;
use crate::cpu::read_ahead;

type Eight = [float32x4_t; 2];

dots!(dots_neon, some_neon, widen, "neon", 8, Eight, zero, load, fma, add, store);

/// Eight elements from `i` on.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn widen<const KIND: u8>(w: *const u8, i: usize) -> Eight {
    // SAFETY: the caller has seen to it that there are eight.
    unsafe {
        match KIND {
            F32 => load(w.cast::<f32>().add(i)),
            _ => {
                let halves = vld1q_u16(w.cast::<u16>().add(i));
                let parts = [vget_low_u16(halves), vget_high_u16(halves)];
                match KIND {
                    F16 => parts.map(|part| widen_f16(part)),
                    _ => parts.map(|part| vreinterpretq_f32_u32(vshll_n_u16::<16>(part))),
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn zero() -> Eight {
    [vdupq_n_f32(0.0); 2]
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(x: *const f32) -> Eight {
    // SAFETY: the caller has seen to it that there are eight.
    unsafe { [vld1q_f32(x), vld1q_f32(x.add(4))] }
}

/// `a b + c`
#[inline]
#[target_feature(enable = "neon")]
fn fma(a: Eight, b: Eight, c: Eight) -> Eight {
    [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])]
}

#[inline]
#[target_feature(enable = "neon")]
fn add(a: Eight, b: Eight) -> Eight {
    [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(place: *mut f32, x: Eight) {
    // SAFETY: the caller has seen to it that there is room for eight.
    unsafe {
        vst1q_f32(place, x[0]);
        vst1q_f32(place.add(4), x[1]);
    }
}
