//! Mixtures of experts (Shazeer et al. 2017): each token goes through the few feed-forward networks that a router chooses.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod product;
#[cfg(test)]
mod tests;

use crate::error::expect;
use crate::packing::PackedLinear;
use crate::{Activation, Error, HostTensor, QuantMatMul, Result};

/// How a router's scores become experts and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    pub experts: usize,
    /// Experts of a token.
    pub per_token: usize,
    pub scores: RouterScores,
    /// Weights are divided by their sum.
    pub renormalise: bool,
    /// Groups of equally many neighbouring experts; 1 where there are none.
    pub groups: usize,
    /// Groups that a token may choose from.
    pub groups_kept: usize,
    /// What weights are multiplied by at last.
    pub factor: f32,
}

/// What makes probabilities of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScores {
    /// Over all experts.
    Softmax,
    /// Of each expert.
    Sigmoid,
}

/// One choice of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    pub expert: u32,
    pub weight: f32,
}

/// A weight of one expert in host memory, without a bias.
#[derive(Clone, Copy, Debug)]
pub enum HostExpert<'a> {
    /// Stacked along `out`: gate then up, or down alone.
    Dense(&'a [HostTensor<'a>]),
    Quantized(&'a PackedLinear<'a>),
}

/// What a mixture of experts is made of. Rows of experts are collected by [`crate::Device::gather_rows`].
pub trait Experts: QuantMatMul {
    /// The choices of some tokens, `[tokens, per_token]`, on the device.
    type Routes: Send + Sync;

    /// Gate, up and down of all experts of a layer.
    type ExpertWeights: Send + Sync;

    /// `p = softmax(scores)` or `sigmoid(scores)`. `p + bias` chooses, where there is a bias, and `p` weighs. Of several
    /// groups those are kept whose two largest `p + bias` have the largest sum; experts of the others are never
    /// chosen (DeepSeek-AI 2024). Weights are the chosen `p`, divided by their sum where
    /// [`Routing::renormalise`] says so (plus 1e-20 for sigmoids), times the factor. A token's choices come in the order
    /// of what chose them, the largest first; of equal ones the lower index first.
    ///
    /// scores: `[tokens, experts]` as [`crate::MatMul::logits`] makes them, bias: `[1, experts]`, a wide tensor
    fn route(
        &self,
        scores: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        routing: &Routing,
    ) -> Result<Self::Routes>;

    /// The choices on the host, token by token.
    fn routes(&self, routes: &Self::Routes) -> Result<Vec<Route>>;

    /// `y[rows[i]] += weights[i] part[i]`, in place, also for other tensors that share the memory of `y`. The rows are
    /// distinct.
    /// y: `[tokens, features]`, part: `[rows, features]`
    fn scatter_add(
        &self,
        y: &mut Self::Tensor,
        part: &Self::Tensor,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()>;

    /// `y[i] = weights[i] x[i]`, a weight for each row.
    fn weigh_rows(&self, x: &Self::Tensor, weights: &[f32]) -> Result<Self::Tensor>;

    /// `y[t] = a[t] + sigmoid(gate[t]) b[t]`: the gate of a shared expert.
    /// gate: `[tokens, 1]` as [`crate::MatMul::logits`] makes it
    fn add_gated(&self, a: &Self::Tensor, b: &Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor>;

    /// All experts of a layer for [`Self::experts`]. `None` where the device has no product for all of them at once, or
    /// these are not alike: then every expert's weights are products of their own.
    fn expert_weights(
        &self,
        gate_up: &[HostExpert],
        down: &[HostExpert],
    ) -> Result<Option<Self::ExpertWeights>>;

    /// Name of the kernel that multiplies so many tokens by them.
    fn experts_kernel(&self, weights: &Self::ExpertWeights, tokens: usize) -> &'static str;

    /// `y[t] = sum_i weight[t, i] down_e(activation(gate_e(x[t])) up_e(x[t]))` with `e = expert[t, i]`.
    /// x: `[tokens, hidden]`, result: the same
    fn experts(
        &self,
        x: &Self::Tensor,
        routes: &Self::Routes,
        weights: &Self::ExpertWeights,
        activation: Activation,
    ) -> Result<Self::Tensor>;
}

/// Added to the sum that sigmoids are divided by.
pub(crate) const SIGMOID_SUM: f32 = 1e-20;

/// A score for every expert, as many choices as there can be, groups that fit.
pub(crate) fn check_routing(
    scores: (usize, usize),
    bias: Option<(usize, usize)>,
    routing: &Routing,
) -> Result<()> {
    let Routing { experts, per_token, groups, groups_kept, .. } = *routing;
    expect("router scores", (scores.0, experts), scores)?;
    expect("router bias", (1, experts), bias.unwrap_or((1, experts)))?;
    if !(1..=experts).contains(&per_token) {
        return Err(Error::shape("experts per token", format!("1 to {experts}"), per_token));
    }
    if groups == 0 || !experts.is_multiple_of(groups) {
        return Err(Error::shape("groups of experts", format!("a divisor of {experts}"), groups));
    }
    if !(1..=groups).contains(&groups_kept) {
        return Err(Error::shape("kept groups of experts", format!("1 to {groups}"), groups_kept));
    }
    Ok(())
}

/// A weight for each row, rows of `y` that there are.
pub(crate) fn check_scatter(
    y: (usize, usize),
    part: (usize, usize),
    rows: &[u32],
    weights: &[f32],
) -> Result<()> {
    expect("scatter_add", (rows.len(), y.1), part)?;
    check_weights(rows.len(), weights)?;
    match rows.iter().find(|row| **row as usize >= y.0) {
        Some(row) => Err(Error::shape("scatter_add", format!("rows below {}", y.0), row)),
        None => Ok(()),
    }
}

pub(crate) fn check_weights(rows: usize, weights: &[f32]) -> Result<()> {
    expect("weights of rows", rows, weights.len())
}

/// Equal shapes, and a gate for each row.
pub(crate) fn check_gate(a: (usize, usize), b: (usize, usize), gate: (usize, usize)) -> Result<()> {
    expect("add_gated", a, b)?;
    expect("gate of a shared expert", (a.0, 1), gate)
}
