//! A decoder layer: attention and an MLP, each between a norm or two and the residual stream.
//!
//! | stage | linears | input | what follows |
//! | --- | --- | --- | --- |
//! | qkv | q_proj k_proj v_proj | norm(hidden) | rope, attention |
//! | o | o_proj | attention output | norm, + residual |
//! | gate_up | gate_proj up_proj | norm(hidden) | activation(gate) * up |
//! | down | down_proj | that product | norm, + residual |
//! | mixture | router and experts, in the place of the last two | norm(hidden) | norm, + residual |
//!
//! Families have either norm, or both. What a layer holds is said by [`crate::layout::LayerSpec`].

use gptq_kernels::{Activation, Backend, Batch, Norm};

use super::attention::AttentionPart;
use super::mixture::Mixture;
use super::projection::{HostProjection, Projection};
use super::{ModelFiles, norm_weight};
use crate::layout::{self, LayerSpec, Mlp, MlpKind, Role, Stage};
use crate::{Error, Result};

/// One decoder layer.
pub struct Layer<B: Backend> {
    spec: LayerSpec,
    norms: Norms<B>,
    eps: f32,
    activation: Activation,
    /// What is added to the residual stream is multiplied by it.
    residual_factor: f32,
    attention: AttentionPart<B>,
    /// In the order of the spec's groups, those of a mixture apart; `None` until they are put in.
    projections: Vec<Option<Projection<B>>>,
    mixture: Option<Mixture<B>>,
}

/// Weights `[1, hidden]`, where the family has the norm.
struct Norms<B: Backend> {
    before_attention: Option<B::Tensor>,
    after_attention: Option<B::Tensor>,
    before_mlp: Option<B::Tensor>,
    after_mlp: Option<B::Tensor>,
}

/// What flows between two stages: the residual stream, and the input of the next stage's linears.
pub struct State<T> {
    /// `[tokens, hidden]`
    pub hidden: T,
    /// `[tokens, in]` of the next stage.
    pub input: T,
}

impl<B: Backend> Layer<B> {
    /// Layer `index` with what was read of its groups, in the order of its spec.
    pub fn new(backend: &B, files: &ModelFiles, index: usize, groups: &[HostProjection]) -> Result<Self> {
        let mut layer = Self::without_linears(backend, files, index)?;
        let place = |role| layer.spec.position(role);
        let (gate_up, down) = (place(Role::GateUp(Mlp::Whole)), place(Role::Down(Mlp::Whole)));
        // From the last on: gate and up may leave their result in the order in which down wants it.
        for (i, read) in groups.iter().enumerate().take(layer.projections.len()).rev() {
            let gated = Some(i) == gate_up && layer.norms.before_mlp.is_some();
            let projection = match gated {
                true => {
                    let down = down.and_then(|down| layer.projections[down].as_ref());
                    let order = down.and_then(|down| down.input_order(backend));
                    Projection::gated(backend, read, order.as_ref())?
                }
                false => Projection::new(backend, read)?,
            };
            layer.projections[i] = Some(projection);
        }
        if let Some(mixture) = &mut layer.mixture {
            mixture.put(backend, &layer.spec, groups)?;
        }
        Ok(layer)
    }

    /// Layer `index` with the files' norms, its linears still to be put in.
    pub fn without_linears(backend: &B, files: &ModelFiles, index: usize) -> Result<Self> {
        let config = &files.config;
        let spec = layout::layer(config, index);
        let names = config.family().norms;
        let norm = |name: Option<&str>| {
            let name = name.map(|name| format!("{}{name}.weight", layout::layer_prefix(index)));
            name.map(|name| norm_weight(backend, files, &name, config.hidden_size)).transpose()
        };
        let own = spec.groups.iter().filter(|group| group.role.stage() != Stage::Mixture).count();
        let mixture = match spec.mlp {
            MlpKind::Dense => None,
            MlpKind::Experts { .. } => Some(Mixture::without_linears(backend, files, index)?),
        };
        Ok(Self {
            norms: Norms {
                before_attention: norm(names.before_attention)?,
                after_attention: norm(names.after_attention)?,
                before_mlp: norm(names.before_mlp)?,
                after_mlp: norm(names.after_mlp)?,
            },
            eps: config.rms_norm_eps as f32,
            activation: config.activation,
            residual_factor: config.residual_factor as f32,
            attention: AttentionPart::new(backend, files, index)?,
            projections: (0..own).map(|_| None).collect(),
            mixture,
            spec,
        })
    }

    pub fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    /// Puts in the weights of one group: the quantizer does, once it has solved them.
    pub fn replace(&mut self, role: Role, projection: Projection<B>) {
        match (&mut self.mixture, self.spec.position(role)) {
            (Some(mixture), _) if role.stage() == Stage::Mixture => mixture.replace(role, projection),
            (_, Some(place)) => self.projections[place] = Some(projection),
            (_, None) => {}
        }
    }

    /// The experts, where the layer has some.
    pub fn mixture(&self) -> Option<&Mixture<B>> {
        self.mixture.as_ref()
    }

    /// The state before the first stage.
    pub fn enter(&self, backend: &B, hidden: B::Tensor) -> Result<State<B::Tensor>> {
        let input = self.normed(backend, &hidden, self.norms.before_attention.as_ref())?;
        Ok(State { hidden, input })
    }

    /// Runs a stage that begins a block, which leaves the residual stream alone: returns the input of the one
    /// that ends it.
    pub fn follow(&self, backend: &B, stage: Stage, input: &B::Tensor, batch: &Batch) -> Result<B::Tensor> {
        let output = self.product(backend, stage, input)?;
        match stage {
            Stage::Qkv => self.attention.forward(backend, &output, batch, None, None),
            _ => Ok(backend.gated(&output, self.activation)?),
        }
    }

    /// Runs a stage that ends a block, by adding to the residual stream.
    pub fn rejoin(
        &self,
        backend: &B,
        stage: Stage,
        input: &B::Tensor,
        hidden: B::Tensor,
    ) -> Result<State<B::Tensor>> {
        let hidden = self.add_product(backend, stage, input, hidden)?;
        let input = match stage {
            Stage::O => self.normed(backend, &hidden, self.norms.before_mlp.as_ref())?,
            _ => hidden.clone(),
        };
        Ok(State { hidden, input })
    }

    /// What a stage makes of its input: the linears' outputs side by side, or what the experts say.
    pub fn product(&self, backend: &B, stage: Stage, input: &B::Tensor) -> Result<B::Tensor> {
        match &self.mixture {
            Some(mixture) if stage == Stage::Mixture => mixture.forward(backend, input),
            _ => self.projection(stage)?.forward(backend, input),
        }
    }

    /// Whether what a stage's linears put out is what is added to the residual stream, and nothing else.
    pub fn adds_products(&self, stage: Stage) -> bool {
        matches!(stage, Stage::O | Stage::Down)
            && self.norm_after(stage).is_none()
            && self.residual_factor == 1.0
    }

    /// All stages, in as few operations as the device has for them: `[tokens, hidden]` to the same.
    pub fn forward(
        &self,
        backend: &B,
        hidden: B::Tensor,
        batch: &Batch,
        cache: Option<&mut B::KvCache>,
    ) -> Result<B::Tensor> {
        let (qkv, o) = (self.projection(Stage::Qkv)?, self.projection(Stage::O)?);
        let x = match self.norm(&self.norms.before_attention) {
            Some(norm) => qkv.normed(backend, &hidden, norm)?,
            None => qkv.forward(backend, &hidden)?,
        };
        let x = self.attention.forward(backend, &x, batch, cache, o.input_order(backend).as_ref())?;
        let hidden = self.add_product(backend, Stage::O, &x, hidden)?;
        let x = match (&self.mixture, self.norm(&self.norms.before_mlp)) {
            (Some(_), _) => self.normed(backend, &hidden, self.norms.before_mlp.as_ref())?,
            (None, Some(norm)) => {
                self.projection(Stage::GateUp)?.normed_gate_up(backend, &hidden, norm, self.activation)?
            }
            (None, None) => {
                let product = self.product(backend, Stage::GateUp, &hidden)?;
                backend.gated(&product, self.activation)?
            }
        };
        let last = if self.mixture.is_some() { Stage::Mixture } else { Stage::Down };
        self.add_product(backend, last, &x, hidden)
    }

    /// The residual stream after a stage that ends a block.
    fn add_product(&self, backend: &B, stage: Stage, x: &B::Tensor, hidden: B::Tensor) -> Result<B::Tensor> {
        // Of several devices each would add the residual stream.
        if self.adds_products(stage) && backend.devices() == 1 {
            return self.projection(stage)?.add_to(backend, x, hidden);
        }
        let product = backend.all_reduce(self.product(backend, stage, x)?)?;
        self.add(backend, &hidden, product, self.norm_after(stage))
    }

    /// `hidden + factor * norm(output)`
    fn add(
        &self,
        backend: &B,
        hidden: &B::Tensor,
        output: B::Tensor,
        after: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        let output = self.normed(backend, &output, after)?;
        Ok(match self.residual_factor {
            1.0 => backend.add(hidden, &output)?,
            factor => backend.add_scaled(hidden, &output, factor)?,
        })
    }

    fn normed(&self, backend: &B, x: &B::Tensor, weight: Option<&B::Tensor>) -> Result<B::Tensor> {
        match weight {
            Some(weight) => Ok(backend.rms_norm(x, weight, self.eps)?),
            None => Ok(x.clone()),
        }
    }

    fn norm<'a>(&self, weight: &'a Option<B::Tensor>) -> Option<Norm<'a, B::Tensor>> {
        weight.as_ref().map(|weight| Norm { weight, eps: self.eps })
    }

    fn norm_after(&self, stage: Stage) -> Option<&B::Tensor> {
        match stage {
            Stage::O => self.norms.after_attention.as_ref(),
            _ => self.norms.after_mlp.as_ref(),
        }
    }

    fn projection(&self, stage: Stage) -> Result<&Projection<B>> {
        let projection = self.spec.first_of(stage).and_then(|place| self.projections.get(place)?.as_ref());
        projection.ok_or_else(|| not_put_in(stage.name()))
    }

    /// Whether a sequence of the batch is so long that its rotation differs from that of others.
    pub fn rotation_varies(&self, batch: &Batch) -> bool {
        self.attention.rotation_varies(batch)
    }

    /// Each stage with the names of the kernels that multiply so many rows.
    pub fn kernels(&self, backend: &B, rows: usize) -> Vec<(Stage, Vec<&'static str>)> {
        let of = |stage: &Stage| match &self.mixture {
            Some(mixture) if *stage == Stage::Mixture => (*stage, mixture.kernels(backend, rows)),
            _ => (*stage, self.projection(*stage).map_or(vec![], |stage| stage.kernels(backend, rows))),
        };
        self.spec.stages().iter().map(of).collect()
    }

    /// The projections in the order in which a pass reads them, but those of experts.
    pub fn projections(&self) -> impl Iterator<Item = &Projection<B>> {
        self.projections.iter().flatten()
    }
}

/// A group whose weights are asked for too early.
pub(super) fn not_put_in(group: impl std::fmt::Display) -> Error {
    Error::Unsound { tensor: format!("stage {group}"), problem: "its weights were not put in yet".into() }
}
