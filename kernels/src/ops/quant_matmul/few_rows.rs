//! Weights in the order of the tensor cores' fragments, and the product that reads them once for few rows.

use cudarc::driver::CudaSlice;

use super::cuda::StoredWeight;
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::ops::matmul::cuda::{CudaWeight, FEW_ROWS_OUTPUTS, FEW_ROWS_THREADS};
use crate::packing::PackedLinear;
use crate::{Device, Dtype, Result};

pub(crate) const SOURCE: &str = include_str!("few_rows.cu");

/// Up to so many rows the product is bound by reading the weights; beyond, dequantizing and cuBLAS win.
const FEW_ROWS: usize = 64;

/// Tokens of one tile of the kernel.
const TILE: usize = 8;

/// Most chunks of a unit, the features that share one reading of their grid.
const LARGEST_UNIT: usize = 2;

/// A weight repacked for few rows.
pub(crate) struct Fragments {
    /// `[out / 16, chunks, 32 lanes, 4 words]`
    codes: CudaSlice<u32>,
    /// `[out / 16, groups, 8, 2]`: scale and zero point in one word.
    grids: CudaSlice<u32>,
    /// Feature at each place, groups in one run each; `None` where that is the file's own order.
    order: Option<CudaSlice<u32>>,
    bias: Option<CudaTensor>,
    bits: u32,
    /// `(out, in)`
    dims: (usize, usize),
    plan: Plan,
}

/// How the kernel goes through the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    groups: usize,
    group_size: usize,
    /// Chunks of a unit; 0 where a chunk has two groups.
    unit: usize,
    /// A group is `2^shift` units.
    shift: i32,
}

impl Plan {
    /// `None` where the kernel has no way through the groups of this matrix.
    fn of(packed: &PackedLinear, order: &[u32]) -> Option<Self> {
        let (n, k, groups) = (packed.out_features, packed.in_features, packed.groups());
        let chunk = match packed.bits {
            4 => 64,
            8 => 32,
            _ => return None,
        };
        if !n.is_multiple_of(2 * FEW_ROWS_OUTPUTS) || !k.is_multiple_of(chunk) || groups == 0 {
            return None;
        }
        let chunks = k / chunk;
        let group_size = k.div_ceil(groups);
        let regular =
            |(place, feature): (usize, &u32)| packed.g_idx[*feature as usize] as usize == place / group_size;
        if !order.iter().enumerate().all(regular) {
            return None;
        }
        let per_group = group_size / chunk;
        let (unit, shift) = match groups {
            1 => ([LARGEST_UNIT, 1].into_iter().find(|unit| chunks.is_multiple_of(*unit))?, 30),
            _ if 2 * group_size == chunk => (0, 0),
            _ if !group_size.is_power_of_two() || per_group == 0 || !chunks.is_multiple_of(per_group) => {
                return None;
            }
            _ if per_group <= LARGEST_UNIT => (per_group, 0),
            _ => (LARGEST_UNIT, (per_group / LARGEST_UNIT).ilog2() as i32),
        };
        Some(Self { groups, group_size, unit, shift })
    }
}

/// Features sorted by group, each group in file order.
fn order_of(g_idx: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..g_idx.len() as u32).collect();
    order.sort_by_key(|feature| g_idx[*feature as usize]);
    order
}

impl Fragments {
    /// Repacks what the file holds; `None` for shapes that the kernel does not take.
    pub fn new(card: &Cuda, packed: &PackedLinear, stored: &StoredWeight) -> Result<Option<Self>> {
        let order = order_of(&packed.g_idx);
        let Some(plan) = Plan::of(packed, &order).filter(|_| card.dtype() != Dtype::F32) else {
            return Ok(None);
        };
        let ((n, k), bits) = (stored.dims, stored.bits);
        let words = n * k * bits as usize / 32;
        let on_card = card.upload(&order)?;
        let (codes, grids) = (card.alloc::<u32>(words)?, card.alloc::<u32>(plan.groups * n)?);
        let args = [
            Arg::Address(card.address(&codes)),
            Arg::Address(card.address(&stored.qweight)),
            Arg::Address(card.address(&on_card)),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(bits as i32),
        ];
        card.launch("repack_codes", Launch::threads(words), &args)?;
        let args = [
            Arg::Address(card.address(&grids)),
            Arg::Address(card.address(&stored.scales)),
            Arg::Address(card.address(&stored.qzeros)),
            Arg::Int(plan.groups as i32),
            Arg::Int(n as i32),
            Arg::Int(bits as i32),
            Arg::Int(stored.zero_offset as i32),
        ];
        card.launch("repack_grids", Launch::threads(plan.groups * n), &args)?;
        let in_order = order.iter().enumerate().all(|(place, feature)| place == *feature as usize);
        let bias = packed.bias.clone().map(|bias| card.tensor(bias, (1, n))).transpose()?;
        Ok(Some(Self { codes, grids, order: (!in_order).then_some(on_card), bias, bits, dims: (n, k), plan }))
    }

    /// `(out, in)`
    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    pub fn product(&self, card: &Cuda, x: &CudaTensor) -> Result<CudaTensor> {
        let x = self.ordered(card, x)?;
        let (rows, k) = card.shape(&x);
        if rows > FEW_ROWS {
            return crate::MatMul::matmul(card, &x, &self.dequantized(card)?);
        }
        let n = self.dims.0;
        let y = card.new_tensor((rows, n))?;
        let args = [
            Arg::Address(card.real(&y)?),
            Arg::Address(card.real(&x)?),
            Arg::Address(card.address(&self.codes)),
            Arg::Address(card.address(&self.grids)),
            Arg::Address(self.bias.as_ref().map_or(Ok(0), |bias| card.real(bias))?),
            Arg::Int(rows as i32),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(self.plan.groups as i32),
            Arg::Int(self.plan.shift),
        ];
        let (kernel, outputs) = self.kernel(rows);
        card.launch(kernel, Launch::blocks(n / outputs, FEW_ROWS_THREADS), &args)?;
        Ok(y)
    }

    /// The kernel for so many rows, and the outputs of one of its blocks.
    fn kernel(&self, rows: usize) -> (&'static str, usize) {
        let names: &[&'static str; 4] = match (self.bits, self.plan.unit) {
            (4, 0) => &NAMES_4_0,
            (4, 1) => &NAMES_4_1,
            (4, _) => &NAMES_4_2,
            (_, 1) => &NAMES_8_1,
            (_, _) => &NAMES_8_2,
        };
        match rows.div_ceil(TILE) {
            0 | 1 => (names[0], FEW_ROWS_OUTPUTS),
            2 => (names[1], FEW_ROWS_OUTPUTS),
            3 | 4 => (names[2], 2 * FEW_ROWS_OUTPUTS),
            _ => (names[3], 2 * FEW_ROWS_OUTPUTS),
        }
    }

    /// The input in the order of the groups.
    fn ordered(&self, card: &Cuda, x: &CudaTensor) -> Result<CudaTensor> {
        let Some(order) = &self.order else {
            return Ok(x.clone());
        };
        let y = card.new_tensor(card.shape(x))?;
        let args = [
            Arg::Address(card.real(&y)?),
            Arg::Address(card.real(x)?),
            Arg::Address(card.address(order)),
            Arg::Int(self.dims.1 as i32),
        ];
        card.launch("order_columns", Launch::blocks(card.shape(x).0, 256), &args)?;
        Ok(y)
    }

    /// `[out, in]`, input features in the order of the groups.
    fn dequantized(&self, card: &Cuda) -> Result<CudaWeight> {
        let (n, k) = self.dims;
        let values = card.alloc::<u8>(n * k * card.dtype().size())?;
        let args = [
            Arg::Address(card.address(&values)),
            Arg::Address(card.address(&self.codes)),
            Arg::Address(card.address(&self.grids)),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(self.bits as i32),
            Arg::Int(self.plan.group_size as i32),
        ];
        card.launch("dequantize_fragments", Launch::threads(n * k * self.bits as usize / 32), &args)?;
        Ok(CudaWeight::new(values.into(), self.dims, false, self.bias.clone()))
    }
}

macro_rules! names {
    ($name:ident, $bits:literal, $unit:literal) => {
        /// Kernels by the tiles of tokens that they take: 1, 2, 4 and 8.
        const $name: [&str; 4] = [
            concat!("few_rows_quant_", $bits, "_1_", $unit),
            concat!("few_rows_quant_", $bits, "_2_", $unit),
            concat!("few_rows_quant_", $bits, "_4_", $unit),
            concat!("few_rows_quant_", $bits, "_8_", $unit),
        ];
    };
}

names!(NAMES_4_0, 4, 0);
names!(NAMES_4_1, 4, 1);
names!(NAMES_4_2, 4, 2);
names!(NAMES_8_1, 8, 1);
names!(NAMES_8_2, 8, 2);
