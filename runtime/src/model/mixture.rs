//! A mixture of experts in the place of an MLP: a router sends every token to a few of them.

use std::collections::HashMap;

use gptq_kernels::{Activation, Backend, HostExpert, Routing};

use super::ModelFiles;
use super::layer::not_put_in;
use super::projection::{HostProjection, Projection};
use crate::config::{ExpertNames, ExpertsConfig};
use crate::layout::{self, LayerSpec, Mlp, Role};
use crate::{Error, Result};

/// Router and experts of one layer.
pub struct Mixture<B: Backend> {
    /// `[experts, hidden]`
    router: B::Weight,
    /// What is added to scores where experts are chosen, `[1, experts]`.
    correction: Option<B::Tensor>,
    routing: Routing,
    activation: Activation,
    /// All experts as one product, where the device has it.
    grouped: Option<B::ExpertWeights>,
    /// What was put in of the groups that are no part of it.
    projections: HashMap<Role, Projection<B>>,
    /// An MLP that all tokens go through beside the experts.
    shared: bool,
    /// `[1, hidden]`: the sigmoid of its product weighs what that MLP makes.
    shared_gate: Option<B::Weight>,
}

/// The tokens that go to one expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Rows of the batch, in its order.
    pub rows: Vec<u32>,
    /// What the expert's results are multiplied by.
    pub weights: Vec<f32>,
}

impl<B: Backend> Mixture<B> {
    /// The router of layer `index`, its experts still to be put in.
    pub fn without_linears(backend: &B, files: &ModelFiles, index: usize) -> Result<Self> {
        let (config, prefix) = (&files.config, layout::layer_prefix(index));
        let (Some(experts), Some(names)) = (&config.experts, config.family().experts) else {
            return Err(Error::Unsound {
                tensor: format!("{prefix}mlp"),
                problem: "its config has no experts".into(),
            });
        };
        let weight = |name: &str, rows: usize| -> Result<B::Weight> {
            let shape = [rows, config.hidden_size];
            let stored = files.checkpoint.tensor(&format!("{prefix}{name}.weight"), &shape)?;
            Ok(backend.weight(&[stored], &[])?)
        };
        let correction = |name: &str| -> Result<B::Tensor> {
            let stored = files.checkpoint.tensor(&format!("{prefix}{name}"), &[experts.count])?;
            Ok(backend.wide_tensor(stored.to_f32(), (1, experts.count))?)
        };
        let shared = names.shared.is_some() && experts.shared_width > 0;
        Ok(Self {
            router: weight(names.router, experts.count)?,
            correction: names.correction.map(correction).transpose()?,
            routing: routing(experts, names),
            activation: config.activation,
            grouped: None,
            projections: HashMap::new(),
            shared,
            shared_gate: names.shared_gate.filter(|_| shared).map(|name| weight(name, 1)).transpose()?,
        })
    }

    /// Puts in what was read of a layer's groups.
    pub(super) fn put(&mut self, backend: &B, spec: &LayerSpec, groups: &[HostProjection]) -> Result<()> {
        let read = |which: Mlp| {
            let of = |role| spec.position(role).and_then(|place| groups.get(place));
            of(Role::GateUp(which)).zip(of(Role::Down(which)))
        };
        let experts: Vec<_> = (0..self.routing.experts).filter_map(|i| read(Mlp::Expert(i))).collect();
        let (gate_up, down): (Vec<_>, Vec<_>) = experts.iter().copied().unzip();
        self.grouped = match (host_experts(&gate_up), host_experts(&down)) {
            (Some(gate_up), Some(down)) => backend.expert_weights(&gate_up, &down)?,
            _ => None,
        };
        let alone = experts.into_iter().enumerate().filter(|_| self.grouped.is_none());
        let alone = alone.map(|(index, pair)| (Mlp::Expert(index), pair));
        for (mlp, (gate_up, down)) in alone.chain(read(Mlp::Shared).map(|pair| (Mlp::Shared, pair))) {
            self.projections.insert(Role::GateUp(mlp), Projection::new(backend, gate_up)?);
            self.projections.insert(Role::Down(mlp), Projection::new(backend, down)?);
        }
        Ok(())
    }

    /// Puts in the weights of one group.
    pub(super) fn replace(&mut self, role: Role, projection: Projection<B>) {
        self.projections.insert(role, projection);
    }

    /// What all experts together make of `x`, `[tokens, hidden]` to the same.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let routes = self.route(backend, x)?;
        let y = match &self.grouped {
            Some(weights) => backend.experts(x, &routes, weights, self.activation)?,
            None => self.one_by_one(backend, x, &self.assignments(backend, &routes)?)?,
        };
        if !self.shared {
            return Ok(y);
        }
        let of_all = self.down(backend, Mlp::Shared, &self.gate_up(backend, Mlp::Shared, x)?)?;
        Ok(match &self.shared_gate {
            Some(gate) => backend.add_gated(&y, &of_all, &backend.logits(x, gate)?)?,
            None => backend.add(&y, &of_all)?,
        })
    }

    fn one_by_one(&self, backend: &B, x: &B::Tensor, assignments: &[Tokens]) -> Result<B::Tensor> {
        let shape = backend.shape(x);
        let mut y = backend.tensor(vec![0.0; shape.0 * shape.1], shape)?;
        for (index, tokens) in assignments.iter().enumerate().filter(|(_, tokens)| !tokens.rows.is_empty()) {
            let mlp = Mlp::Expert(index);
            let x = backend.gather_rows(x, &tokens.rows)?;
            let part = self.down(backend, mlp, &self.gate_up(backend, mlp, &x)?)?;
            backend.scatter_add(&mut y, &part, &tokens.rows, &tokens.weights)?;
        }
        Ok(y)
    }

    /// Names of the kernels that so many tokens go through.
    pub fn kernels(&self, backend: &B, tokens: usize) -> Vec<&'static str> {
        let grouped = self.grouped.iter().map(|weights| backend.experts_kernel(weights, tokens));
        let others = self.projections.values().flat_map(|projection| projection.kernels(backend, tokens));
        grouped.chain(others).collect()
    }

    /// Where every token goes.
    pub fn route(&self, backend: &B, x: &B::Tensor) -> Result<B::Routes> {
        let scores = backend.logits(x, &self.router)?;
        Ok(backend.route(&scores, self.correction.as_ref(), &self.routing)?)
    }

    /// The tokens of each expert.
    pub fn assignments(&self, backend: &B, routes: &B::Routes) -> Result<Vec<Tokens>> {
        let mut experts = vec![Tokens::default(); self.routing.experts];
        for (row, routes) in backend.routes(routes)?.chunks(self.routing.per_token).enumerate() {
            for route in routes {
                let tokens = &mut experts[route.expert as usize];
                tokens.rows.push(row as u32);
                tokens.weights.push(route.weight);
            }
        }
        Ok(experts)
    }

    /// `activation(gate) * up` of one MLP.
    pub fn gate_up(&self, backend: &B, mlp: Mlp, x: &B::Tensor) -> Result<B::Tensor> {
        let product = self.projection(Role::GateUp(mlp))?.forward(backend, x)?;
        Ok(backend.gated(&product, self.activation)?)
    }

    /// The last product of one MLP.
    pub fn down(&self, backend: &B, mlp: Mlp, x: &B::Tensor) -> Result<B::Tensor> {
        self.projection(Role::Down(mlp))?.forward(backend, x)
    }

    fn projection(&self, role: Role) -> Result<&Projection<B>> {
        self.projections.get(&role).ok_or_else(|| not_put_in(role.name()))
    }
}

fn routing(experts: &ExpertsConfig, names: &ExpertNames) -> Routing {
    Routing {
        experts: experts.count,
        per_token: experts.per_token,
        scores: names.scores,
        renormalise: experts.renormalise,
        groups: experts.groups,
        groups_kept: experts.groups_kept,
        factor: experts.factor as f32,
    }
}

/// `None` where linears of an expert differ in how they are stored.
fn host_experts<'a>(read: &[&'a HostProjection<'a>]) -> Option<Vec<HostExpert<'a>>> {
    let host = |read: &&'a HostProjection<'a>| match read {
        HostProjection::Dense(weights, _) => Some(HostExpert::Dense(weights)),
        HostProjection::Quantized(packed) => Some(HostExpert::Quantized(packed)),
        HostProjection::Parts(_) => None,
    };
    read.iter().map(host).collect()
}
