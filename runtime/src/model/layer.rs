//! A decoder layer is four stages, each "input, linears, what follows":
//!
//! | stage | linears | input | what follows |
//! | --- | --- | --- | --- |
//! | qkv | q_proj k_proj v_proj | rms_norm(hidden) | rope, attention |
//! | o | o_proj | attention output | + residual |
//! | gate_up | gate_proj up_proj | rms_norm(hidden) | silu(gate) * up |
//! | down | down_proj | that product | + residual |

use gptq_kernels::{Activation, AttentionShape, Backend, Batch, Norm, QkNorm, RopeShape};

use super::projection::{HostProjection, Projection};
use super::rope::Rotation;
use super::{ModelFiles, vector};
use crate::config::ModelConfig;
use crate::layout::{self, Stage};
use crate::{Error, Result};

/// One decoder layer.
pub struct Layer<B: Backend> {
    input_norm: B::Tensor,
    post_attention_norm: B::Tensor,
    eps: f32,
    /// In the order of [`Stage::ALL`]; `None` until they are put in.
    projections: [Option<Projection<B>>; 4],
    rotation: Rotation<B>,
    attention: AttentionShape,
}

/// What flows between two stages: the residual stream, and the input of the next stage's linears.
pub struct State<T> {
    /// `[tokens, hidden]`
    pub hidden: T,
    /// `[tokens, in]` of the next stage.
    pub input: T,
}

impl<B: Backend> Layer<B> {
    /// Layer `index` with what was read of its stages.
    pub fn new(backend: &B, files: &ModelFiles, index: usize, stages: &[HostProjection; 4]) -> Result<Self> {
        let mut layer = Self::without_linears(backend, files, index)?;
        // From the last on: a stage may leave its result in the order in which the next one wants it.
        let mut order = None;
        for (stage, read) in Stage::ALL.into_iter().zip(stages).rev() {
            let projection = Projection::new(backend, stage, read, order.as_ref())?;
            order = projection.input_order(backend);
            layer.replace(stage, projection);
        }
        Ok(layer)
    }

    /// Layer `index` with the files' norms, its linears still to be put in.
    pub fn without_linears(backend: &B, files: &ModelFiles, index: usize) -> Result<Self> {
        let config = &files.config;
        let norm = |name: &str, length| {
            vector(backend, files, &format!("{}{name}", layout::layer_prefix(index)), length)
        };
        let (heads, kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let eps = config.rms_norm_eps as f32;
        let head_norm = |name| norm(name, head_dim);
        let norms = match config.qk_norm {
            true => Some(QkNorm {
                q: head_norm("self_attn.q_norm.weight")?,
                k: head_norm("self_attn.k_norm.weight")?,
                eps,
            }),
            false => None,
        };
        let inv_freq = backend.wide_tensor(files.inverse_frequencies.clone(), (1, head_dim / 2))?;
        Ok(Self {
            input_norm: norm("input_layernorm.weight", config.hidden_size)?,
            post_attention_norm: norm("post_attention_layernorm.weight", config.hidden_size)?,
            eps,
            projections: [const { None }; 4],
            rotation: Rotation::new(
                config,
                RopeShape { norms, ..RopeShape::halves(heads, kv_heads, head_dim, inv_freq) },
            ),
            attention: attention_shape(config, index),
        })
    }

    /// Puts in the weights of one stage: the quantizer does, once it has solved them.
    pub fn replace(&mut self, stage: Stage, projection: Projection<B>) {
        self.projections[stage as usize] = Some(projection);
    }

    /// The state before the first stage.
    pub fn enter(&self, backend: &B, hidden: B::Tensor) -> Result<State<B::Tensor>> {
        let input = backend.rms_norm(&hidden, &self.input_norm, self.eps)?;
        Ok(State { hidden, input })
    }

    /// Runs a stage that begins a block, which leaves the residual stream alone: returns the input of the one
    /// that ends it.
    pub fn follow(&self, backend: &B, stage: Stage, input: &B::Tensor, batch: &Batch) -> Result<B::Tensor> {
        let output = self.projection(stage)?.forward(backend, input)?;
        Ok(match stage {
            Stage::Qkv | Stage::O => {
                let rope = self.rotation.shape(backend, batch)?;
                backend.rope_attention(&output, batch, &rope, &self.attention, None, None)?
            }
            Stage::GateUp | Stage::Down => backend.gated(&output, Activation::Silu)?,
        })
    }

    /// Runs a stage that ends a block, by adding to the residual stream.
    pub fn rejoin(
        &self,
        backend: &B,
        stage: Stage,
        input: &B::Tensor,
        hidden: &B::Tensor,
    ) -> Result<State<B::Tensor>> {
        let output = self.projection(stage)?.forward(backend, input)?;
        let hidden = backend.add(hidden, &output)?;
        Ok(match stage {
            Stage::Qkv | Stage::O => {
                State { input: backend.rms_norm(&hidden, &self.post_attention_norm, self.eps)?, hidden }
            }
            Stage::GateUp | Stage::Down => State { input: hidden.clone(), hidden },
        })
    }

    /// What the linears of a stage make of its input, side by side.
    pub fn product(&self, backend: &B, stage: Stage, input: &B::Tensor) -> Result<B::Tensor> {
        self.projection(stage)?.forward(backend, input)
    }

    fn projection(&self, stage: Stage) -> Result<&Projection<B>> {
        self.projections[stage as usize].as_ref().ok_or_else(|| Error::Unsound {
            tensor: format!("stage {}", stage.name()),
            problem: "its weights were not put in yet".into(),
        })
    }

    /// All four stages, in as few operations as the device has for them: `[tokens, hidden]` to the same.
    pub fn forward(
        &self,
        backend: &B,
        hidden: B::Tensor,
        batch: &Batch,
        cache: Option<&mut B::KvCache>,
    ) -> Result<B::Tensor> {
        let [qkv, o] = [self.projection(Stage::Qkv)?, self.projection(Stage::O)?];
        let [gate_up, down] = [self.projection(Stage::GateUp)?, self.projection(Stage::Down)?];
        let norm = |weight| Norm { weight, eps: self.eps };
        let x = qkv.normed(backend, &hidden, norm(&self.input_norm))?;
        let order = o.input_order(backend);
        let rope = self.rotation.shape(backend, batch)?;
        let x = backend.rope_attention(&x, batch, &rope, &self.attention, cache, order.as_ref())?;
        let hidden = o.add_to(backend, &x, &hidden)?;
        let x = gate_up.normed_gate_up(backend, &hidden, norm(&self.post_attention_norm))?;
        down.add_to(backend, &x, &hidden)
    }

    /// Whether a sequence of the batch is so long that its rotation differs from that of others.
    pub fn rotation_varies(&self, batch: &Batch) -> bool {
        self.rotation.varies(batch)
    }

    /// The projections in the order in which a pass reads them.
    pub fn projections(&self) -> impl Iterator<Item = &Projection<B>> {
        self.projections.iter().flatten()
    }
}

/// The attention of layer `index`. What scaling multiplies q and k by is in the factor of their products.
pub fn attention_shape(config: &ModelConfig, index: usize) -> AttentionShape {
    let plain = AttentionShape::new(config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let stretch = config.rope_scaling.attention_factor().powi(2) as f32;
    AttentionShape { window: config.window(index), scale: plain.scale * stretch, ..plain }
}
