//! The product with up to 64 rows: weights are read once, by many small blocks.

use super::fragments::{Fragments, chunk};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
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
    shift: usize,
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
            _ => (LARGEST_UNIT, (per_group / LARGEST_UNIT).ilog2() as usize),
        };
        Some(Self { unit, shift })
    }
}

/// The kernels of one way through the groups, by the tiles of tokens that they take.
macro_rules! kernels {
    ($bits:literal, $unit:literal) => {
        [
            concat!("medium_m_quant_", $bits, "_1_", $unit),
            concat!("medium_m_quant_", $bits, "_2_", $unit),
            concat!("medium_m_quant_", $bits, "_4_", $unit),
            concat!("medium_m_quant_", $bits, "_8_", $unit),
        ]
    };
}

impl Fragments {
    /// x: up to [`ROWS`] rows, in the order of the groups
    pub(super) fn medium_m(&self, gpu: &Cuda, x: &CudaTensor) -> Result<CudaTensor> {
        let ((n, k), rows) = (self.dims, gpu.shape(x).0);
        let tiling = self.medium_m;
        let y = gpu.new_tensor((rows, n))?;
        let args =
            Args::new([gpu.real(&y)?, gpu.values(x)?, gpu.address(&self.codes), gpu.address(&self.grids)])
                .addresses([gpu.real_or_none(self.bias.as_ref())?])
                .ints([rows, k, n, self.groups, tiling.shift]);
        let (kernel, outputs) = self.kernel(tiling, rows);
        gpu.launch(kernel, Launch::blocks(n / outputs, SMALL_M_THREADS), &args)?;
        Ok(y)
    }

    /// The kernel for so many rows, and the outputs of one of its blocks.
    fn kernel(&self, tiling: Tiling, rows: usize) -> (&'static str, usize) {
        let all: [&'static str; 4] = match (self.bits, tiling.unit) {
            (4, 0) => kernels!(4, 0),
            (4, 1) => kernels!(4, 1),
            (4, _) => kernels!(4, 2),
            (_, 1) => kernels!(8, 1),
            (_, _) => kernels!(8, 2),
        };
        let tiles = rows.div_ceil(TILE).next_power_of_two();
        (all[tiles.ilog2() as usize], if tiles <= 2 { SMALL_M_OUTPUTS } else { 2 * SMALL_M_OUTPUTS })
    }
}
