use std::convert::Infallible;

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use super::{
    Experts, HostExpert, Route, RouterScores, Routing, SIGMOID_SUM, check_gate, check_routing, check_scatter,
    check_weights,
};
use crate::cpu::{View, axpy, each_row, exp_in_place, map, maximum};
use crate::{Activation, Cpu, Device, Result, largest};

/// Choices of some tokens, token by token.
pub struct CpuRoutes(Vec<Route>);

impl Experts for Cpu {
    type Routes = CpuRoutes;

    /// There are none: products of their own are as fast here.
    type ExpertWeights = Infallible;

    fn route(&self, scores: &Tensor, bias: Option<&Tensor>, routing: &Routing) -> Result<CpuRoutes> {
        check_routing(self.shape(scores), bias.map(|bias| self.shape(bias)), routing)?;
        let (scores, bias) = (View::of(scores)?, bias.map(View::of).transpose()?);
        let of = |token| {
            route_token(&scores[token * routing.experts..][..routing.experts], bias.as_deref(), routing)
        };
        Ok(CpuRoutes(map(scores.rows, of).concat()))
    }

    fn routes(&self, routes: &CpuRoutes) -> Result<Vec<Route>> {
        Ok(routes.0.clone())
    }

    fn scatter_add(&self, y: &mut Tensor, part: &Tensor, rows: &[u32], weights: &[f32]) -> Result<()> {
        check_scatter(self.shape(y), self.shape(part), rows, weights)?;
        let part = View::of(part)?;
        Ok(y.inplace_op1(&ScatterAdd { part: &part, width: part.columns, rows, weights })?)
    }

    fn weigh_rows(&self, x: &Tensor, weights: &[f32]) -> Result<Tensor> {
        let (rows, width) = self.shape(x);
        check_weights(rows, weights)?;
        let mut y = View::of(x)?.to_vec();
        each_row(&mut y, width, |row, y| y.iter_mut().for_each(|y| *y *= weights[row]));
        self.tensor(y, (rows, width))
    }

    fn add_gated(&self, a: &Tensor, b: &Tensor, gate: &Tensor) -> Result<Tensor> {
        check_gate(self.shape(a), self.shape(b), self.shape(gate))?;
        let (a, b, gate) = (View::of(a)?, View::of(b)?, View::of(gate)?);
        let mut y = a.to_vec();
        let width = a.columns;
        each_row(&mut y, width, |row, y| {
            axpy(1.0 / (1.0 + (-gate[row]).exp()), &b[row * width..][..width], y);
        });
        self.tensor(y, (a.rows, width))
    }

    fn expert_weights(&self, _: &[HostExpert], _: &[HostExpert]) -> Result<Option<Infallible>> {
        Ok(None)
    }

    fn experts_kernel(&self, weights: &Infallible, _: usize) -> &'static str {
        match *weights {}
    }

    fn experts(&self, _: &Tensor, _: &CpuRoutes, weights: &Infallible, _: Activation) -> Result<Tensor> {
        match *weights {}
    }
}

fn route_token(scores: &[f32], bias: Option<&[f32]>, routing: &Routing) -> Vec<Route> {
    let mut probabilities = scores.to_vec();
    match routing.scores {
        RouterScores::Softmax => {
            let most = maximum(scores);
            let total = exp_in_place(&mut probabilities, most);
            probabilities.iter_mut().for_each(|p| *p /= total);
        }
        RouterScores::Sigmoid => probabilities.iter_mut().for_each(|p| *p = 1.0 / (1.0 + (-*p).exp())),
    }
    let mut chooses = probabilities.clone();
    if let Some(bias) = bias {
        chooses.iter_mut().zip(bias).for_each(|(p, bias)| *p += bias);
    }
    if routing.groups > 1 {
        let size = routing.experts / routing.groups;
        let sum = |group: &[f32]| largest(group, 2).iter().map(|(_, p)| p).sum();
        let sums: Vec<f32> = chooses.chunks_exact(size).map(sum).collect();
        let kept = largest(&sums, routing.groups_kept);
        let dropped = chooses.chunks_exact_mut(size).zip(0..).filter(|(_, i)| kept.iter().all(|k| k.0 != *i));
        dropped.for_each(|(group, _)| group.fill(f32::NEG_INFINITY));
    }
    let route = |(expert, _): (u32, f32)| Route { expert, weight: probabilities[expert as usize] };
    let mut routes: Vec<Route> = largest(&chooses, routing.per_token).into_iter().map(route).collect();
    let mut factor = routing.factor;
    if routing.renormalise {
        let added = if routing.scores == RouterScores::Sigmoid { SIGMOID_SUM } else { 0.0 };
        factor /= routes.iter().map(|route| route.weight).sum::<f32>() + added;
    }
    routes.iter_mut().for_each(|route| route.weight *= factor);
    routes
}

/// Rows that are added to some of a tensor's.
struct ScatterAdd<'a> {
    part: &'a [f32],
    width: usize,
    rows: &'a [u32],
    weights: &'a [f32],
}

impl InplaceOp1 for ScatterAdd<'_> {
    fn name(&self) -> &'static str {
        "scatter_add"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(y), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("scatter_add: expected a contiguous f32 tensor");
        };
        let y = &mut y[start..end];
        for ((part, row), weight) in self.part.chunks_exact(self.width).zip(self.rows).zip(self.weights) {
            axpy(*weight, part, &mut y[*row as usize * self.width..][..self.width]);
        }
        Ok(())
    }
}
