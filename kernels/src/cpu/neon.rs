//! What NEON has and the standard library has no stable name for.

use std::arch::aarch64::*;
use std::arch::asm;

/// Four values of 16 bits (IEEE's f16) to f32: an instruction that is older than arithmetic in f16 and needs no extension.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: it reads one register and writes another.
    unsafe {
        asm!("fcvtl {wide:v}.4s, {halves:v}.4h", wide = out(vreg) wide, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}
