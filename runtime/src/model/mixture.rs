//! A mixture of experts in the place of an MLP: a router sends every token to a few of them.

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
    experts: Experts<B>,
    shared: Option<Shared<B>>,
}

/// Weights of all experts.
enum Experts<B: Backend> {
    /// One product for all of them, where the device has it.
    Grouped(B::ExpertWeights),
    /// One after the other.
    Each(Vec<Pair<B>>),
}

/// An MLP; `None` until its weights are put in.
struct Pair<B: Backend> {
    gate_up: Option<Projection<B>>,
    down: Option<Projection<B>>,
}

/// The MLP that all tokens go through beside the experts.
struct Shared<B: Backend> {
    pair: Pair<B>,
    /// `[1, hidden]`: the sigmoid of its product weighs the result.
    gate: Option<B::Weight>,
}

/// The tokens that go to one expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Rows of the batch, in its order.
    pub rows: Vec<u32>,
    /// What the expert's results are multiplied by.
    pub weights: Vec<f32>,
}

impl<B: Backend> Pair<B> {
    fn empty() -> Self {
        Self { gate_up: None, down: None }
    }
}

impl<B: Backend> Mixture<B> {
    /// The router of layer `index`, its experts still to be put in.
    pub fn without_linears(backend: &B, files: &ModelFiles, index: usize) -> Result<Self> {
        let (config, prefix) = (&files.config, layout::layer_prefix(index));
        let (Some(experts), Some(names)) = (&config.experts, config.expert_names()) else {
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
        let shared = |_| -> Result<Shared<B>> {
            let gate = names.shared_gate.map(|name| weight(name, 1)).transpose()?;
            Ok(Shared { pair: Pair::empty(), gate })
        };
        Ok(Self {
            router: weight(names.router, experts.count)?,
            correction: names.correction.map(correction).transpose()?,
            routing: routing(experts, names),
            activation: config.activation,
            experts: Experts::Each((0..experts.count).map(|_| Pair::empty()).collect()),
            shared: names.shared.filter(|_| experts.shared_width > 0).map(shared).transpose()?,
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
        let grouped = match (host_experts(&gate_up), host_experts(&down)) {
            (Some(gate_up), Some(down)) => backend.expert_weights(&gate_up, &down)?,
            _ => None,
        };
        match grouped {
            Some(weights) => self.experts = Experts::Grouped(weights),
            None => {
                for (index, (gate_up, down)) in experts.into_iter().enumerate() {
                    let mlp = Mlp::Expert(index);
                    self.replace(Role::GateUp(mlp), Projection::new(backend, gate_up)?);
                    self.replace(Role::Down(mlp), Projection::new(backend, down)?);
                }
            }
        }
        if let Some((gate_up, down)) = read(Mlp::Shared) {
            self.replace(Role::GateUp(Mlp::Shared), Projection::new(backend, gate_up)?);
            self.replace(Role::Down(Mlp::Shared), Projection::new(backend, down)?);
        }
        Ok(())
    }

    /// Puts in the weights of one group.
    pub(super) fn replace(&mut self, role: Role, projection: Projection<B>) {
        let (mlp, down) = match role {
            Role::GateUp(mlp) => (mlp, false),
            Role::Down(mlp) => (mlp, true),
            Role::Qkv | Role::O => return,
        };
        let pair = match (mlp, &mut self.experts, &mut self.shared) {
            (Mlp::Expert(index), Experts::Each(pairs), _) => pairs.get_mut(index),
            (Mlp::Shared, _, Some(shared)) => Some(&mut shared.pair),
            _ => None,
        };
        if let Some(pair) = pair {
            *(if down { &mut pair.down } else { &mut pair.gate_up }) = Some(projection);
        }
    }

    /// What all experts together make of `x`, `[tokens, hidden]` to the same.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        let routes = self.route(backend, x)?;
        let y = match &self.experts {
            Experts::Grouped(weights) => backend.experts(x, &routes, weights, self.activation)?,
            Experts::Each(_) => self.one_by_one(backend, x, &self.assignments(backend, &routes)?)?,
        };
        let Some(shared) = &self.shared else { return Ok(y) };
        let of_all = self.down(backend, Mlp::Shared, &self.gate_up(backend, Mlp::Shared, x)?)?;
        Ok(match &shared.gate {
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
        let of = |pair: &Pair<B>| -> Vec<&'static str> {
            let both = [&pair.gate_up, &pair.down].into_iter().flatten();
            both.flat_map(|projection| projection.kernels(backend, tokens)).collect()
        };
        let mut kernels = match &self.experts {
            Experts::Grouped(weights) => vec![backend.experts_kernel(weights, tokens)],
            Experts::Each(pairs) => pairs.iter().flat_map(of).collect(),
        };
        kernels.extend(self.shared.iter().flat_map(|shared| of(&shared.pair)));
        kernels
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
        let pair = |mlp| match (mlp, &self.experts, &self.shared) {
            (Mlp::Expert(index), Experts::Each(pairs), _) => pairs.get(index),
            (Mlp::Shared, _, Some(shared)) => Some(&shared.pair),
            _ => None,
        };
        let projection = match role {
            Role::GateUp(mlp) => pair(mlp).and_then(|pair| pair.gate_up.as_ref()),
            Role::Down(mlp) => pair(mlp).and_then(|pair| pair.down.as_ref()),
            Role::Qkv | Role::O => None,
        };
        projection.ok_or_else(|| not_put_in(role.name()))
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
