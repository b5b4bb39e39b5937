//! The inner loop of GPTQ (Frantar et al. 2022, Algorithm 1): one block of columns at a time.

mod cpu;
pub(crate) mod cuda;
mod grid;

use std::ops::Range;

pub use grid::GridSpec;
pub(crate) use grid::TIES_OUTWARD;

use crate::packing::{PackedLinear, ZeroOffset};
use crate::{Error, HostTensor, InverseCholesky, MatMul, Result};

/// In which order the columns are met, and which of them share a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grouping {
    /// Input feature at each place of the sweep.
    pub order: Vec<u32>,
    /// Group of each place of the sweep.
    pub group_of: Vec<u32>,
    /// Number of groups.
    pub groups: usize,
    /// Grids come from the original weights, before the sweep, instead of on entering a group.
    pub static_groups: bool,
}

/// A solved matrix of linears: integer codes from the sweep itself, never rounded a second time.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    pub bits: u32,
    /// `[out, in]`, input features in the checkpoint's order.
    pub codes: Vec<u8>,
    /// `[groups, out]`
    pub scales: Vec<f32>,
    /// `[groups, out]`
    pub zeros: Vec<u8>,
    /// `[in]`: group of each input feature.
    pub g_idx: Vec<u32>,
    /// `[out]`: `sum_i ((w_i - q_i) / U_ii)^2 / 2`, the damped objective in the Hessian's own scale.
    pub losses: Vec<f32>,
}

/// One block: for every column i of it, `q = clamp(round(w / s) + z)`, `e = (w - (q - z) s) / U_ii`, and
/// `W[:, j] -= e U_ij` for the columns j > i of the block; then for all columns after the block.
pub trait GptqSweep: InverseCholesky + MatMul {
    /// Weights as the checkpoint has them, on their way to the device.
    type Source: Send;

    /// Weights being solved, and the codes found so far.
    type Sweep: Send;

    /// A solved matrix on the device.
    type Packed: Send;

    /// Reads `[out_i, in]` matrices, to be stacked along `out`. A thread of its own may do so ahead of time.
    fn sweep_source(&self, weights: &[HostTensor]) -> Result<Self::Source>;

    /// Puts the columns into sweep order; features in `dead` become zero.
    fn sweep_start(
        &self,
        source: &Self::Source,
        dead: &[u32],
        grouping: &Grouping,
        spec: &GridSpec,
    ) -> Result<Self::Sweep>;

    /// Solves the columns of `block` and moves their error to those after it. `factor` is U; `None` stands
    /// for the identity, which is rounding to nearest. A group that is wider than the block must start it.
    fn sweep_block(
        &self,
        sweep: &mut Self::Sweep,
        factor: Option<&Self::Matrix>,
        block: Range<usize>,
    ) -> Result<()>;

    /// Packs the solved matrix as the file has it, still on the device; with it comes each row's loss,
    /// `sum_i ((w_i - q_i) / U_ii)^2 / 2`, the damped objective in the Hessian's own scale.
    fn sweep_pack(
        &self,
        sweep: Self::Sweep,
        zero_offset: ZeroOffset,
        bias: Option<Vec<f32>>,
    ) -> Result<(Self::Packed, Vec<f32>)>;

    /// The packed matrix as a dense weight, with the values that the file will give.
    fn packed_weight(&self, packed: &Self::Packed) -> Result<Self::Weight>;

    /// The packed matrix in host memory. Another thread may ask, and computing goes on meanwhile.
    fn collect(&self, packed: Self::Packed) -> Result<PackedLinear<'static>>;
}

/// Outputs of all matrices together, and their inputs.
fn stacked_dims(weights: &[HostTensor]) -> Result<(usize, usize)> {
    let dims = weights.iter().map(HostTensor::dims2).collect::<Result<Vec<_>>>()?;
    let columns = dims.first().map_or(0, |dims| dims.1);
    match dims.iter().find(|dims| dims.1 != columns) {
        Some(dims) => Err(Error::shape("gptq_sweep weight", (dims.0, columns), dims)),
        None => Ok((dims.iter().map(|dims| dims.0).sum(), columns)),
    }
}

impl Quantized {
    /// `(out, in)`
    pub fn dims(&self) -> (usize, usize) {
        (self.losses.len(), self.g_idx.len())
    }

    /// `(code - zero) * scale`, `[out, in]`.
    pub fn dequantized(&self) -> Vec<f32> {
        let (out_features, in_features) = self.dims();
        let mut values = Vec::with_capacity(out_features * in_features);
        for (n, codes) in self.codes.chunks_exact(in_features).enumerate() {
            values.extend(codes.iter().zip(&self.g_idx).map(|(code, group)| {
                let place = *group as usize * out_features + n;
                (*code as f32 - self.zeros[place] as f32) * self.scales[place]
            }));
        }
        values
    }

    /// The output rows of one linear of the stack.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let (out_features, in_features) = self.dims();
        let per_group = |i: usize| i * out_features + rows.start..i * out_features + rows.end;
        let groups = self.scales.len() / out_features.max(1);
        Self {
            bits: self.bits,
            codes: self.codes[rows.start * in_features..rows.end * in_features].to_vec(),
            scales: (0..groups).flat_map(|g| &self.scales[per_group(g)]).copied().collect(),
            zeros: (0..groups).flat_map(|g| &self.zeros[per_group(g)]).copied().collect(),
            g_idx: self.g_idx.clone(),
            losses: self.losses[rows.clone()].to_vec(),
        }
    }
}

impl Grouping {
    /// Every place of the sweep needs a feature and a group, groups in one run each unless they are static.
    fn check(&self, in_features: usize) -> Result<()> {
        if self.order.len() != in_features || self.group_of.len() != in_features {
            return Err(Error::shape(
                "gptq_sweep order",
                in_features,
                (self.order.len(), self.group_of.len()),
            ));
        }
        match self.group_of.iter().find(|g| **g as usize >= self.groups) {
            Some(g) => Err(Error::shape("gptq_sweep group", format!("below {}", self.groups), g)),
            None => Ok(()),
        }
    }

    /// Group of each input feature.
    pub(crate) fn g_idx(&self) -> Vec<u32> {
        let mut g_idx = vec![0; self.order.len()];
        for (feature, group) in self.order.iter().zip(&self.group_of) {
            g_idx[*feature as usize] = *group;
        }
        g_idx
    }
}
