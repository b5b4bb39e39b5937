//! The product with up to 64 rows: weights are read once, by many small blocks.

use super::fragments::{Fragments, chunk};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::ops::matmul::cuda::{SMALL_M_OUTPUTS, SMALL_M_THREADS};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("medium_m.cu");

/// Up to so many rows the product is bound by reading the weights; beyond, dequantizing and cuBLAS win.
pub(super) const ROWS: usize = 64;

/// Tokens of one tile of the kernel.
const TILE: usize = 8;

/// Most chunks of a unit, the features that share one reading of their grid.
const LARGEST_UNIT: usize = 2;

/// How the kernel goes through the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Chunks of a unit; 0 where a chunk has two groups.
    unit: usize,
    /// A group is `2^shift` units.
    shift: i32,
}

impl Tiling {
    /// `None` where the kernel has no way through the groups of this matrix.
    pub fn of(bits: u32, k: usize, groups: usize, group_size: usize) -> Option<Self> {
        let chunks = k / chunk(bits);
        let per_group = group_size / chunk(bits);
        let (unit, shift) = match groups {
            0 => return None,
            1 => ([LARGEST_UNIT, 1].into_iter().find(|unit| chunks.is_multiple_of(*unit))?, 30),
            _ if 2 * group_size == chunk(bits) && bits == 4 => (0, 0),
            _ if !group_size.is_power_of_two() || per_group == 0 || !chunks.is_multiple_of(per_group) => {
                return None;
            }
            _ if per_group <= LARGEST_UNIT => (per_group, 0),
            _ => (LARGEST_UNIT, (per_group / LARGEST_UNIT).ilog2() as i32),
        };
        Some(Self { unit, shift })
    }
}

impl Fragments {
    /// `None` for more rows than the kernel takes.  x: in the order of the groups
    pub(super) fn medium_m(&self, gpu: &Cuda, x: &CudaTensor) -> Result<Option<CudaTensor>> {
        let ((n, k), rows) = (self.dims, gpu.shape(x).0);
        if rows > ROWS {
            return Ok(None);
        }
        let tiling = self.medium_m;
        let y = gpu.new_tensor((rows, n))?;
        let args = [
            Arg::Address(gpu.real(&y)?),
            Arg::Address(gpu.values(x)?),
            Arg::Address(gpu.address(&self.codes)),
            Arg::Address(gpu.address(&self.grids)),
            Arg::Address(self.bias.as_ref().map_or(Ok(0), |bias| gpu.real(bias))?),
            Arg::Int(rows as i32),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(self.groups as i32),
            Arg::Int(tiling.shift),
        ];
        let (kernel, outputs) = self.kernel(tiling, rows);
        gpu.launch(kernel, Launch::blocks(n / outputs, SMALL_M_THREADS), &args)?;
        Ok(Some(y))
    }

    /// The kernel for so many rows, and the outputs of one of its blocks.
    fn kernel(&self, tiling: Tiling, rows: usize) -> (&'static str, usize) {
        let names: &[&'static str; 4] = match (self.bits, tiling.unit) {
            (4, 0) => &NAMES_4_0,
            (4, 1) => &NAMES_4_1,
            (4, _) => &NAMES_4_2,
            (_, 1) => &NAMES_8_1,
            (_, _) => &NAMES_8_2,
        };
        match rows.div_ceil(TILE) {
            0 | 1 => (names[0], SMALL_M_OUTPUTS),
            2 => (names[1], SMALL_M_OUTPUTS),
            3 | 4 => (names[2], 2 * SMALL_M_OUTPUTS),
            _ => (names[3], 2 * SMALL_M_OUTPUTS),
        }
    }
}

macro_rules! names {
    ($name:ident, $bits:literal, $unit:literal) => {
        /// Kernels by the tiles of tokens that they take: 1, 2, 4 and 8.
        const $name: [&str; 4] = [
            concat!("medium_m_quant_", $bits, "_1_", $unit),
            concat!("medium_m_quant_", $bits, "_2_", $unit),
            concat!("medium_m_quant_", $bits, "_4_", $unit),
            concat!("medium_m_quant_", $bits, "_8_", $unit),
        ];
    };
}

names!(NAMES_4_0, 4, 0);
names!(NAMES_4_1, 4, 1);
names!(NAMES_4_2, 4, 2);
names!(NAMES_8_1, 8, 1);
names!(NAMES_8_2, 8, 2);
