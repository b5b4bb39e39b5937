//! The attention of a layer: everything between q|k|v and the output projection.

use gptq_kernels::{AttentionShape, Backend, Batch, QkNorm, QueryGrowth, RopeShape};

use super::rope::{Rotation, local_frequencies};
use super::{ModelFiles, norm_weight};
use crate::Result;
use crate::config::{ModelConfig, QkNormKind};
use crate::layout;

pub(super) struct AttentionPart<B: Backend> {
    rotation: Rotation<B>,
    shape: AttentionShape,
}

impl<B: Backend> AttentionPart<B> {
    /// That of layer `index`.
    pub fn new(backend: &B, files: &ModelFiles, index: usize) -> Result<Self> {
        let config = &files.config;
        let norm = |name: &str, length| {
            let name = format!("{}self_attn.{name}.weight", layout::layer_prefix(index));
            norm_weight(backend, files, &name, length)
        };
        let (q, k) = config.qk_norm_widths();
        let norms = match config.qk_norm {
            QkNormKind::None => None,
            QkNormKind::Head | QkNormKind::AllHeads => {
                Some(QkNorm { q: norm("q_norm", q)?, k: norm("k_norm", k)?, eps: config.rms_norm_eps as f32 })
            }
        };
        let frequencies = match kind(config, index) {
            Kind::Main => files.inverse_frequencies.clone(),
            Kind::Local(theta) => local_frequencies(config, theta),
            // A turn by no angle.
            Kind::None => vec![0.0; config.head_dim / 2],
        };
        let inv_freq = backend.wide_tensor(frequencies, (1, config.head_dim / 2))?;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let partial = config.rotated() < config.head_dim && kind(config, index) == Kind::Main;
        let growth = |growth: crate::config::QueryGrowth| QueryGrowth {
            beta: growth.beta as f32,
            original: growth.original,
        };
        let shape = RopeShape {
            turned: config.rotated(),
            pairing: config.family().pairing,
            stretch: if partial { config.rope_scaling.attention_factor() as f32 } else { 1.0 },
            norms,
            query_growth: config.query_growth.map(growth),
            ..RopeShape::halves(heads, kv_heads, config.head_dim, inv_freq)
        };
        let rotation = Rotation::new(config, shape, kind(config, index) == Kind::Main);
        Ok(Self { rotation, shape: attention_shape(config, index) })
    }

    /// qkv: `[tokens, (heads + 2 kv_heads) head_dim]`, result: `[tokens, heads head_dim]`, in `order` where there is one.
    pub fn forward(
        &self,
        backend: &B,
        qkv: &B::Tensor,
        batch: &Batch,
        cache: Option<&mut B::KvCache>,
        order: Option<&B::Order>,
    ) -> Result<B::Tensor> {
        let rope = self.rotation.shape(backend, batch)?;
        Ok(backend.rope_attention(qkv, batch, &rope, &self.shape, cache, order)?)
    }

    /// Whether a sequence of the batch is so long that its rotation differs from that of others.
    pub fn rotation_varies(&self, batch: &Batch) -> bool {
        self.rotation.varies(batch)
    }
}

/// How a layer is rotated.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Main,
    /// By a base of its own, which nothing scales.
    Local(f64),
    None,
}

fn kind(config: &ModelConfig, index: usize) -> Kind {
    match config.local_rope_theta {
        _ if config.unrotated_layers.get(index) == Some(&true) => Kind::None,
        Some(theta) if config.is_local(index) => Kind::Local(theta),
        _ => Kind::Main,
    }
}

/// The attention of layer `index`. What scaling multiplies all of q and k by is in the factor of their products.
pub fn attention_shape(config: &ModelConfig, index: usize) -> AttentionShape {
    let plain = AttentionShape::new(config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let whole = config.rotated() == config.head_dim && kind(config, index) == Kind::Main;
    let stretch = if whole { config.rope_scaling.attention_factor().powi(2) as f32 } else { 1.0 };
    let scale = config.attention_scale.map_or(plain.scale, |scale| scale as f32);
    AttentionShape {
        window: config.window(index),
        scale: scale * stretch,
        soft_cap: config.score_cap.map(|cap| cap as f32),
        ..plain
    }
}
