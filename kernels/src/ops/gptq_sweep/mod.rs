//! The inner loop of GPTQ (Frantar et al. 2022, Algorithm 1): one block of columns at a time.

mod cpu;
pub(crate) mod cuda;
mod grid;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub(crate) use grid::TIES_OUTWARD;
pub use grid::{GridKind, GridSpec};

use crate::error::expect;
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
///
/// Around the blocks, with H the second moments of the input x, `H + damp` by [`InverseCholesky::damped`]:
///
/// - before them, [`SweepTarget::sweep_pull`] and [`SweepTarget::sweep_toward`] move the weights to the target of
///   another objective;
/// - after them, [`SweepRefine::sweep_refine`] changes codes and scales where that brings the result nearer to a target;
/// - at any time, [`SweepRefine::sweep_losses`] measures, and [`SweepRefine::sweep_take_rows`] goes back to an earlier
///   state.
///
/// Matrices beside H are `[out, in]` with columns in sweep order, except where features are named.
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

    /// Solves the columns of `block` and moves their error to those after it; solved columns then hold the values of
    /// their codes. `factor` is U; `None` stands for the identity, which is rounding to nearest. A group that is wider
    /// than the block must start it. Blocks follow each other, and errors may reach columns late, but before they are solved.
    ///
    /// With [`GridKind::Loop`] and a factor, the grid of a group that the sweep enters is found by sweeping copies of its
    /// columns, one a candidate, which leave all others alone: they add up `((w - q) / U_ii)^2`, and the candidate with
    /// the least sum is taken, the first of equal ones. Errors move within windows of [`LOOP_WINDOW`] columns, counted
    /// from the group's start; a group that is no wider is swept exactly as it will be.
    fn sweep_block(
        &self,
        sweep: &mut Self::Sweep,
        factor: Option<&Self::Matrix>,
        block: Range<usize>,
    ) -> Result<()>;

    /// Packs the solved matrix as the file has it, still on the device; with it comes each row's loss,
    /// `sum_i ((w_i - q_i) / U_ii)^2 / 2`, the damped objective in the Hessian's own scale, as the sweep left it.
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

/// Sums over tokens that tell what outputs of W should be where its inputs are x, see
/// [`crate::Hessian::accumulate_products`].
#[derive(Clone, Copy, Debug)]
pub enum Wanted<M> {
    /// C `[in, in]`, `sum (x_f - x) x^T`: what W makes of the inputs x_f, so that `P = W C`.
    OfInputs(M),
    /// S `[out, in]`, `sum y x^T`, and H of the same tokens: outputs y, so that `P = S - W H`.
    Outputs(M, M),
}

/// What a sweep starts from, and where it is to go.
pub trait SweepTarget: GptqSweep {
    /// The values of a source as a dense weight, with a bias for all rows or none: the model as it was.
    fn source_weight(&self, source: &Self::Source, bias: Option<Vec<f32>>) -> Result<Self::Weight>;

    /// The weights as they are: those to come, and of solved columns the values of their codes.
    fn sweep_weights(&self, sweep: &Self::Sweep) -> Result<Self::Matrix>;

    /// P `[out, in]`: how outputs of W would have to change, by the inputs x that call for it. `weights` are in sweep order,
    /// and so is P; sums have features in the checkpoint's order.
    fn sweep_pull(
        &self,
        weights: &Self::Matrix,
        order: &[u32],
        wanted: Wanted<&Self::Matrix>,
    ) -> Result<Self::Matrix>;

    /// `W += share P (H + damp)^-1 = share (P U^T) U`; all of it is the least
    /// `sum |W_0 x_f + h_f - W x - h|^2 + damp |W - W_0|^2`.
    fn sweep_toward(
        &self,
        sweep: &mut Self::Sweep,
        pull: &Self::Matrix,
        factor: &Self::Matrix,
        share: f32,
    ) -> Result<()>;
}

/// What becomes of a finished sweep.
pub trait SweepRefine: GptqSweep {
    /// Lowers `(W - Q) H (W - Q)^T` of a finished sweep for the target W, `rounds` times over. `hessian` is symmetric and
    /// positive definite, in sweep order. With `G = (W - Q) H`, a round takes window after window of at most
    /// [`LOOP_WINDOW`] columns; in each
    ///
    /// - for each column j in turn: the code nearest to `q_j + G_j / H_jj`, and `G -= (change of q_j) H_j`;
    /// - for each group in turn, k being its codes less their zero: `s += (G k^T) / (k H k^T)`, rounded as scales are and
    ///   left alone where that gains nothing or its sign would change, and `G -= (change of s) k H`.
    ///
    /// Groups that are wider than a window, or scattered, have their turn once all codes had theirs. No step raises the
    /// loss. G is made when a window is entered, of its columns alone, and kept up to date inside.
    fn sweep_refine(
        &self,
        sweep: &mut Self::Sweep,
        target: &Self::Matrix,
        hessian: &Self::Matrix,
        rounds: usize,
    ) -> Result<()>;

    /// Of each row `E H E^T + 2 E P^T` with E = `weights` - the sweep's weights as they are: what the sweep's choice costs
    /// at the output. H is symmetric, in sweep order; without a pull, P is zero. A GPU may take E and H to 11 bits.
    fn sweep_losses(
        &self,
        sweep: &Self::Sweep,
        weights: &Self::Matrix,
        hessian: &Self::Matrix,
        pull: Option<&Self::Matrix>,
    ) -> Result<Vec<f32>>;

    /// The sweep as it is now.
    fn sweep_copy(&self, sweep: &Self::Sweep) -> Result<Self::Sweep>;

    /// Puts back rows of an earlier copy: weights, codes, grids and losses.
    fn sweep_take_rows(&self, sweep: &mut Self::Sweep, from: &Self::Sweep, rows: Range<usize>) -> Result<()>;
}

/// Columns within which errors move at once, one column after the other.
pub const LOOP_WINDOW: usize = 128;

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

/// The sums must be those of a stage of these weights.
pub(crate) fn check_wanted<M>(
    ((rows, columns), order): ((usize, usize), &[u32]),
    wanted: Wanted<M>,
    dims: impl Fn(M) -> (usize, usize),
) -> Result<()> {
    let square = (columns, columns);
    expect("sweep_pull order", columns, order.len())?;
    match wanted {
        Wanted::OfInputs(shift) => expect("sweep_pull", square, dims(shift)),
        Wanted::Outputs(outputs, hessian) => {
            expect("sweep_pull", ((rows, columns), square), (dims(outputs), dims(hessian)))
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

    /// Windows of at most [`LOOP_WINDOW`] columns, and whether every group lies whole in one of them.
    fn windows(&self) -> (Vec<Range<usize>>, bool) {
        let runs: Vec<usize> = self.group_of.chunk_by(|a, b| a == b).map(<[u32]>::len).collect();
        let whole = runs.len() == self.groups && runs.iter().all(|run| *run <= LOOP_WINDOW);
        let steps = if whole { runs } else { vec![1; self.group_of.len()] };
        let mut windows: Vec<Range<usize>> = Vec::new();
        for step in steps {
            let start = windows.last().map_or(0, |window| window.end);
            match windows.last_mut() {
                Some(window) if start + step - window.start <= LOOP_WINDOW => window.end += step,
                _ => windows.push(start..start + step),
            }
        }
        (windows, whole)
    }

    /// The places of the sweep in each group.
    pub(crate) fn places(&self) -> Vec<Vec<usize>> {
        let mut places = vec![Vec::new(); self.groups];
        self.group_of.iter().enumerate().for_each(|(place, group)| places[*group as usize].push(place));
        places
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
