//! The one Llama: inference composes its stages, the quantizer walks them.

mod layer;
mod projection;
mod rope;

use std::ops::Range;
use std::path::Path;

pub use layer::{Layer, State};
pub use projection::{Projection, dense_parts, stage_linears};

use gptq_kernels::{Backend, Batch};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::quant_config::QuantConfig;
use crate::{Result, layout};

/// A checkpoint or artifact on disk: what it says of itself, and its tensors.
pub struct ModelFiles {
    pub config: ModelConfig,
    /// `None` for a checkpoint that is not quantized.
    pub quant: Option<QuantConfig>,
    pub checkpoint: Checkpoint,
    /// Rotary angle of each pair of features per position, `[head_dim / 2]`.
    pub inverse_frequencies: Vec<f32>,
}

impl ModelFiles {
    /// Opens a model folder; every tensor that the config asks for is there and has its shape.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = ModelConfig::from_file(&dir.join("config.json"))?;
        let quant = QuantConfig::read(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        if quant.is_none() {
            checkpoint.verify_against(&layout::checkpoint_tensors(&config))?;
        }
        Ok(Self { inverse_frequencies: rope::inverse_frequencies(&config), config, quant, checkpoint })
    }
}

/// A model whose weights lie on a backend.
pub struct Model<B: Backend> {
    pub config: ModelConfig,
    backend: B,
    embedding: B::Weight,
    layers: Vec<Layer<B>>,
    norm: B::Tensor,
    /// `None` where the embedding serves as the head.
    lm_head: Option<B::Weight>,
}

/// Keys and values of every layer.
pub struct KvCaches<B: Backend>(Vec<B::KvCache>);

/// What decoding keeps between two tokens: the step as the device recorded it.
pub struct Decoder<B: Backend> {
    /// With the tensor that the step reads its input from.
    recorded: Option<(B::Recording, B::Tensor)>,
    /// The device records nothing.
    plain: bool,
}

impl<B: Backend> Default for Decoder<B> {
    fn default() -> Self {
        Self { recorded: None, plain: false }
    }
}

impl<B: Backend> Model<B> {
    /// Loads every layer of a checkpoint or an artifact.
    pub fn load(backend: B, files: &ModelFiles) -> Result<Self> {
        let config = files.config.clone();
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::load(&backend, files, i))
            .collect::<Result<Vec<_>>>()?;
        let head = (!config.tie_word_embeddings).then(|| matrix(&backend, files, "lm_head.weight"));
        Ok(Self {
            embedding: embedding(&backend, files)?,
            norm: vector(&backend, files, "model.norm.weight", config.hidden_size)?,
            lm_head: head.transpose()?,
            layers,
            backend,
            config,
        })
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Room for `blocks` blocks of keys and values in every layer.
    pub fn kv_caches(&self, blocks: usize) -> Result<KvCaches<B>> {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        let caches = self.layers.iter().map(|_| self.backend.kv_cache(blocks, width));
        Ok(KvCaches(caches.collect::<Result<_, _>>()?))
    }

    /// The last hidden states `[tokens, hidden]`, normed and ready for [`Self::logits`].
    pub fn forward(&self, ids: &[u32], batch: &Batch, caches: Option<&mut KvCaches<B>>) -> Result<B::Tensor> {
        self.through_layers(self.backend.embedding(&self.embedding, ids)?, batch, caches)
    }

    fn through_layers(
        &self,
        mut hidden: B::Tensor,
        batch: &Batch,
        mut caches: Option<&mut KvCaches<B>>,
    ) -> Result<B::Tensor> {
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches.0[i]);
            hidden = layer.forward(&self.backend, hidden, batch, cache)?;
        }
        Ok(self.backend.rms_norm(&hidden, &self.norm, self.config.rms_norm_eps as f32)?)
    }

    /// Scores after one new token a sequence, `[sequences, vocab]`, valid until the next call.
    pub fn decode(
        &self,
        ids: &[u32],
        batch: &Batch,
        caches: &mut KvCaches<B>,
        decoder: &mut Decoder<B>,
    ) -> Result<B::Tensor> {
        let hidden = self.backend.embedding(&self.embedding, ids)?;
        if let Some((recording, input)) = &decoder.recorded
            && self.backend.shape(input) == self.backend.shape(&hidden)
        {
            self.backend.assign(input, &hidden)?;
            if let Some(logits) = self.backend.replay(recording, batch)? {
                return Ok(logits);
            }
        }
        let mut step = || -> Result<B::Tensor> {
            let hidden = self.through_layers(hidden.clone(), batch, Some(&mut *caches))?;
            self.logits(&hidden, 0..ids.len())
        };
        if !decoder.plain {
            let recorded = self.backend.record(batch, &mut step)?;
            decoder.plain = recorded.is_none();
            decoder.recorded = recorded.map(|recording| (recording, hidden.clone()));
            if let Some((recording, _)) = &decoder.recorded
                && let Some(logits) = self.backend.replay(recording, batch)?
            {
                return Ok(logits);
            }
        }
        step()
    }

    /// Scores of every vocabulary entry for the given rows, `[rows, vocab]`.
    pub fn logits(&self, hidden: &B::Tensor, rows: Range<usize>) -> Result<B::Tensor> {
        let hidden = self.backend.rows(hidden, rows)?;
        Ok(self.backend.logits(&hidden, self.lm_head.as_ref().unwrap_or(&self.embedding))?)
    }
}

/// The embedding table, `[vocab, hidden]`.
pub fn embedding<B: Backend>(backend: &B, files: &ModelFiles) -> Result<B::Weight> {
    matrix(backend, files, "model.embed_tokens.weight")
}

fn matrix<B: Backend>(backend: &B, files: &ModelFiles, name: &str) -> Result<B::Weight> {
    let shape = [files.config.vocab_size, files.config.hidden_size];
    Ok(backend.weight(&[files.checkpoint.tensor(name, &shape)?], &[])?)
}

fn vector<B: Backend>(backend: &B, files: &ModelFiles, name: &str, length: usize) -> Result<B::Tensor> {
    Ok(backend.tensor_from_host(&files.checkpoint.tensor(name, &[length])?)?)
}
