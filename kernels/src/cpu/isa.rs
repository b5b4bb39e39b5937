//! Which instructions the processor at hand has.

use std::sync::LazyLock;

/// Sets of vector instructions that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 and tiles of integers (AMX): Intel's servers since Sapphire Rapids. Products of many tokens with codes use them,
    /// all else is as with [`Self::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with integer dot products (VNNI): Intel since Ice Lake, AMD since Zen 4.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA: nearly every x86 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 128 bits, which every aarch64 processor has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// What the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub fn best() -> Self {
        static BEST: LazyLock<Isa> = LazyLock::new(|| Isa::all()[0]);
        *BEST
    }

    /// All that this processor has, the best first.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni");
            if avx2 && avx512 {
                if may_use_amx() {
                    all.push(Self::Amx);
                }
                all.push(Self::Avx512);
            }
            if avx2 {
                all.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Self::Neon);
        all.push(Self::Portable);
        all
    }
}

/// Whether there are tiles of integers, and the system lets this process use them: it has to be asked.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_amx() -> bool {
    /// Of `arch_prctl`: asks for a part of the processor's state, here the tiles.
    const ASK: libc::c_long = 0x1023;
    const TILES: libc::c_long = 18;
    // AMX-TILE and AMX-INT8.
    let has = std::arch::x86_64::__cpuid_count(7, 0).edx >> 24 & 3 == 3;
    // SAFETY: the call only changes what this process may do.
    has && unsafe { libc::syscall(libc::SYS_arch_prctl, ASK, TILES) } == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_amx() -> bool {
    false
}
