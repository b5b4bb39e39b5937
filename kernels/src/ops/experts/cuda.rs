use super::product::CudaExperts;
use super::{
    Experts, HostExpert, Route, RouterScores, Routing, SIGMOID_SUM, check_gate, check_routing, check_scatter,
    check_weights,
};
use crate::cuda::{Args, Bytes, Cuda, CudaTensor, Launch};
use crate::{Activation, Device, Error, Result};

pub(crate) const SOURCE: &str = include_str!("route.cu");

/// Kernels of this folder whose names do not begin with `expert_`.
pub(crate) const KERNELS: [&str; 6] =
    ["route", "scatter_add", "weigh_rows", "add_gated", "sum_experts", "order_codes"];

/// Most experts: one for each thread of the kernel that sorts.
pub(super) const MOST_EXPERTS: usize = 1024;

/// Threads of a block that moves a row.
const THREADS: u32 = 256;

/// Choices on the GPU.
pub struct CudaRoutes {
    /// `[tokens, per_token]` experts, u32.
    pub(super) experts: Bytes,
    /// `[tokens, per_token]` weights, f32.
    pub(super) weights: Bytes,
    pub(super) tokens: usize,
    pub(super) per_token: usize,
    /// Experts that there are.
    pub(super) of: usize,
}

impl Experts for Cuda {
    type Routes = CudaRoutes;
    type ExpertWeights = CudaExperts;

    fn route(&self, scores: &CudaTensor, bias: Option<&CudaTensor>, routing: &Routing) -> Result<CudaRoutes> {
        check_routing(self.shape(scores), bias.map(|bias| self.shape(bias)), routing)?;
        let Routing { experts, per_token, groups, .. } = *routing;
        if experts > MOST_EXPERTS {
            return Err(Error::shape("experts on CUDA", format!("at most {MOST_EXPERTS}"), experts));
        }
        let tokens = self.shape(scores).0;
        let routes = CudaRoutes {
            experts: self.scratch(4 * tokens * per_token)?,
            weights: self.scratch(4 * tokens * per_token)?,
            tokens,
            per_token,
            of: experts,
        };
        let sigmoid = routing.scores == RouterScores::Sigmoid;
        let args =
            Args::new([self.arrived(&routes.experts)?, self.arrived(&routes.weights)?, self.wide(scores)?])
                .addresses([bias.map_or(Ok(0), |bias| self.wide(bias))?])
                .ints([experts, per_token, usize::from(sigmoid), usize::from(routing.renormalise)])
                .floats([if sigmoid { SIGMOID_SUM } else { 0.0 }])
                .ints([groups, routing.groups_kept])
                .floats([routing.factor]);
        let launch = Launch::blocks(tokens, 32).shared(4 * (3 * experts + 2 * groups));
        self.launch("route", launch.early(), &args)?;
        Ok(routes)
    }

    fn routes(&self, routes: &CudaRoutes) -> Result<Vec<Route>> {
        let bytes = 4 * routes.tokens * routes.per_token;
        let words = |part| self.answer(&self.view(part, 0..bytes)?);
        let (experts, weights) = (words(&routes.experts)?, words(&routes.weights)?);
        let pairs = experts.words()?.into_iter().zip(weights.words()?);
        Ok(pairs.map(|(expert, weight)| Route { expert, weight: f32::from_bits(weight) }).collect())
    }

    fn scatter_add(
        &self,
        y: &mut CudaTensor,
        part: &CudaTensor,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()> {
        check_scatter(self.shape(y), self.shape(part), rows, weights)?;
        let (places, factors) = (self.upload(rows)?, self.upload(weights)?);
        let args =
            Args::new([self.real(y)?, self.real(part)?, self.address(&places), self.address(&factors)])
                .ints([self.shape(y).1]);
        self.launch("scatter_add", Launch::blocks(rows.len(), THREADS), &args)
    }

    fn weigh_rows(&self, x: &CudaTensor, weights: &[f32]) -> Result<CudaTensor> {
        let shape = self.shape(x);
        check_weights(shape.0, weights)?;
        let (y, factors) = (self.new_tensor(shape)?, self.upload(weights)?);
        let args = Args::new([self.real(&y)?, self.real(x)?, self.address(&factors)]).ints([shape.1]);
        self.launch("weigh_rows", Launch::blocks(shape.0, THREADS), &args)?;
        Ok(y)
    }

    fn add_gated(&self, a: &CudaTensor, b: &CudaTensor, gate: &CudaTensor) -> Result<CudaTensor> {
        let shape = self.shape(a);
        check_gate(shape, self.shape(b), self.shape(gate))?;
        let y = self.new_tensor(shape)?;
        let args =
            Args::new([self.real(&y)?, self.real(a)?, self.real(b)?, self.wide(gate)?]).ints([shape.1]);
        self.launch("add_gated", Launch::blocks(shape.0, THREADS).early(), &args)?;
        Ok(y)
    }

    fn expert_weights(&self, gate_up: &[HostExpert], down: &[HostExpert]) -> Result<Option<CudaExperts>> {
        CudaExperts::new(self, gate_up, down)
    }

    fn experts_kernel(&self, _: &CudaExperts, _: usize) -> &'static str {
        "grouped product"
    }

    fn experts(
        &self,
        x: &CudaTensor,
        routes: &CudaRoutes,
        weights: &CudaExperts,
        activation: Activation,
    ) -> Result<CudaTensor> {
        weights.forward(self, x, routes, activation)
    }
}
