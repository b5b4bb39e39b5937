//! The one Llama: inference composes its stages, the quantizer walks them.

mod attention;
mod files;
mod head;
mod layer;
mod mixture;
mod projection;
mod rope;

use std::collections::BTreeMap;
use std::ops::Range;

pub use attention::attention_shape;
pub use files::ModelFiles;
pub use head::Head;
pub use layer::{Layer, State};
pub use mixture::{Mixture, Tokens};
pub use projection::{HostProjection, Projection, dense_parts};

use gptq_kernels::{Backend, Batch, KvDtype, KvShape, RowSampling, SequenceRows};

use rayon::prelude::*;

use crate::Result;
use crate::config::ModelConfig;
use crate::layout;

/// A model whose weights lie on a backend.
pub struct Model<B: Backend> {
    pub config: ModelConfig,
    backend: B,
    /// `None` where the head's weight serves as the embedding table.
    embedding: Option<B::Weight>,
    layers: Vec<Layer<B>>,
    head: Head<B>,
    /// Of the caches that it makes.
    kv_dtype: KvDtype,
}

/// Keys and values of every layer.
pub struct KvCaches<B: Backend> {
    layers: Vec<B::KvCache>,
    /// A block beside those that were asked for: sequences that only fill up a step write there.
    spare: u32,
}

impl<B: Backend> Default for KvCaches<B> {
    /// No room for anything.
    fn default() -> Self {
        Self { layers: Vec::new(), spare: 0 }
    }
}

/// What decoding keeps between two tokens: steps as the device captured them.
pub struct Decoder<B: Backend> {
    /// By their rows, with the tensor that a step reads its input from.
    captured: BTreeMap<usize, (B::Graph, B::Tensor)>,
    /// The device captures nothing.
    plain: bool,
}

impl<B: Backend> Default for Decoder<B> {
    fn default() -> Self {
        Self { captured: BTreeMap::new(), plain: false }
    }
}

/// Up to so many sequences a step is captured, for a number of them that is a power of two.
const MOST_CAPTURED: usize = 128;

impl<B: Backend> Model<B> {
    /// Loads every layer of a checkpoint or an artifact.
    pub fn load(backend: B, files: &ModelFiles) -> Result<Self> {
        let config = files.config.clone();
        let layers = load_layers(&backend, files)?;
        let projections: Vec<_> = layers.iter().flat_map(Layer::projections).collect();
        for (one, next) in projections.iter().zip(projections.iter().cycle().skip(1)) {
            one.read_next(&backend, next);
        }
        let slow = projections.iter().filter(|projection| projection.is_dequantized(&backend)).count();
        if slow > 0 {
            tracing::warn!(
                matrices = slow,
                of = projections.len(),
                "dequantized for every product, which is slow: the fast kernels compute in f16 or bf16, with scales that \
                 f16 holds, groups of 16, 32, ... features, and widths of whole chunks of 64"
            );
        }
        Ok(Self {
            embedding: (!config.tie_word_embeddings).then(|| embedding(&backend, files)).transpose()?,
            head: Head::load(&backend, files)?,
            kv_dtype: KvDtype::Auto,
            layers,
            backend,
            config,
        })
    }

    pub fn layers(&self) -> &[Layer<B>] {
        &self.layers
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// With caches of this type from now on.
    pub fn with_kv_dtype(self, kv_dtype: KvDtype) -> Self {
        Self { kv_dtype, ..self }
    }

    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// Room for `blocks` blocks of keys and values in every layer.
    pub fn kv_caches(&self, blocks: usize) -> Result<KvCaches<B>> {
        let ModelConfig { num_key_value_heads: kv_heads, head_dim, .. } = self.config;
        let shape = KvShape { blocks: blocks + 1, kv_heads, head_dim, dtype: self.kv_dtype };
        Ok(KvCaches { layers: self.backend.kv_caches(self.layers.len(), shape)?, spare: blocks as u32 })
    }

    /// Hidden states of tokens before the first layer, `[tokens, hidden]`.
    pub fn embed(&self, ids: &[u32]) -> Result<B::Tensor> {
        scaled(&self.backend, &self.config, self.backend.embedding(self.table(), ids)?)
    }

    /// Of embeddings, `[vocab, hidden]`.
    fn table(&self) -> &B::Weight {
        self.embedding.as_ref().unwrap_or(&self.head.weight)
    }

    /// The last hidden states `[tokens, hidden]`, normed and ready for [`Self::logits`]. Without caches every token sees
    /// exact keys and values, whatever [`Self::kv_dtype`] is.
    pub fn forward(&self, ids: &[u32], batch: &Batch, caches: Option<&mut KvCaches<B>>) -> Result<B::Tensor> {
        self.through_layers(self.backend.embedding(self.table(), ids)?, batch, caches)
    }

    /// From rows of the embedding table to the last hidden states.
    fn through_layers(
        &self,
        rows: B::Tensor,
        batch: &Batch,
        mut caches: Option<&mut KvCaches<B>>,
    ) -> Result<B::Tensor> {
        let mut hidden = scaled(&self.backend, &self.config, rows)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches.layers[i]);
            hidden = layer.forward(&self.backend, hidden, batch, cache)?;
        }
        self.head.norm(&self.backend, &hidden)
    }

    /// Scores after one new token a sequence, `[sequences, vocab]`, valid until the next call. Where it is said how tokens
    /// are drawn, those that cannot decide it may be missing, as in [`Self::scores`].
    pub fn decode(
        &self,
        ids: &[u32],
        batch: &Batch,
        sampling: Option<&[RowSampling]>,
        caches: &mut KvCaches<B>,
        decoder: &mut Decoder<B>,
    ) -> Result<B::Tensor> {
        let count = ids.len();
        if decoder.plain || count > MOST_CAPTURED || self.rotation_varies(batch) {
            let hidden = self.forward(ids, batch, Some(caches))?;
            return self.scores(&hidden, sampling);
        }
        let (asked, (mut ids, batch)) = ((ids, batch), (ids.to_vec(), filled(batch, caches)));
        ids.resize(batch.sequences.len(), 0);
        let replay = |decoder: &Decoder<B>| {
            self.replay(&batch, decoder, |input| self.backend.embedding_into(input, self.table(), &ids))
        };
        if let Some(logits) = replay(decoder)? {
            return Ok(self.backend.rows(&logits, 0..count)?);
        }
        let hidden = self.backend.embedding(self.table(), &ids)?;
        let mut step = || -> Result<B::Tensor> {
            let hidden = self.through_layers(hidden.clone(), &batch, Some(&mut *caches))?;
            self.logits(&hidden, 0..ids.len())
        };
        match self.backend.capture(&batch, &mut step)? {
            Some(graph) => decoder.captured.insert(ids.len(), (graph, hidden.clone())),
            None => None,
        };
        decoder.plain = !decoder.captured.contains_key(&ids.len());
        if decoder.plain && self.backend.works_aside() {
            tracing::warn!(
                "decoding steps could not be captured: every kernel is launched by itself, which is slower"
            );
        }
        match replay(decoder)? {
            Some(logits) => Ok(self.backend.rows(&logits, 0..count)?),
            None => {
                let hidden = self.forward(asked.0, asked.1, Some(caches))?;
                self.scores(&hidden, sampling)
            }
        }
    }

    /// The same for tokens that are still being sampled, one a sequence: where the step is captured, the host does not
    /// wait for them.
    pub fn decode_sampled(
        &self,
        sampled: &B::Sampled,
        batch: &Batch,
        sampling: Option<&[RowSampling]>,
        caches: &mut KvCaches<B>,
        decoder: &mut Decoder<B>,
    ) -> Result<B::Tensor> {
        let count = batch.sequences.len();
        if !decoder.plain && count <= MOST_CAPTURED && !self.rotation_varies(batch) {
            let batch = filled(batch, caches);
            let replayed = self.replay(&batch, decoder, |input| {
                self.backend.embedding_of_sampled(input, self.table(), sampled)
            })?;
            if let Some(logits) = replayed {
                return Ok(self.backend.rows(&logits, 0..count)?);
            }
        }
        let ids =
            self.backend.sampled_tokens(sampled)?.into_iter().map(|token| token.map_or(0, |token| token.id));
        self.decode(&ids.collect::<Vec<_>>(), batch, sampling, caches, decoder)
    }

    /// Runs a captured step on what `embed` writes into its input; `None` where there is no step for such a batch.
    fn replay(
        &self,
        batch: &Batch,
        decoder: &Decoder<B>,
        embed: impl FnOnce(&B::Tensor) -> gptq_kernels::Result<()>,
    ) -> Result<Option<B::Tensor>> {
        let Some((graph, input)) = decoder.captured.get(&batch.sequences.len()) else {
            return Ok(None);
        };
        embed(input)?;
        Ok(self.backend.replay(graph, batch)?)
    }

    /// Whether the frequencies of a long sequence depend on its length: then a captured step, which has one set, does not
    /// fit.
    fn rotation_varies(&self, batch: &Batch) -> bool {
        self.layers.first().is_some_and(|layer| layer.rotation_varies(batch))
    }

    /// Which kernels multiply so many rows, with the stages that they multiply in: `small_m (qkv, o, gate_up, down)`. The
    /// choice follows from what was found out about each weight when it was loaded.
    pub fn kernels(&self, rows: usize) -> String {
        let mut stages: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (stage, kernels) in self.layers.iter().flat_map(|layer| layer.kernels(&self.backend, rows)) {
            for kernel in kernels {
                let stages = stages.entry(kernel).or_default();
                if !stages.contains(&stage.name()) {
                    stages.push(stage.name());
                }
            }
        }
        let named: Vec<_> =
            stages.iter().map(|(kernel, stages)| format!("{kernel} ({})", stages.join(", "))).collect();
        named.join("; ")
    }

    /// Scores of every vocabulary entry for the given rows, `[rows, vocab]`.
    pub fn logits(&self, hidden: &B::Tensor, rows: Range<usize>) -> Result<B::Tensor> {
        self.head.logits(&self.backend, hidden, rows)
    }

    /// How much of the head's memory [`Self::scores`] reads at least.
    pub fn head_share(&self, sampling: &[RowSampling]) -> f64 {
        self.head.share_read(&self.backend, sampling)
    }

    /// Scores of every vocabulary entry, `[rows, vocab]`; where it is said how a token is drawn for each row, those that
    /// cannot decide it may be minus infinity.
    pub fn scores(&self, hidden: &B::Tensor, sampling: Option<&[RowSampling]>) -> Result<B::Tensor> {
        self.head.scores(&self.backend, hidden, sampling)
    }
}

/// The batch with as many sequences as a step is captured for.
fn filled<B: Backend>(batch: &Batch, caches: &KvCaches<B>) -> Batch {
    let mut sequences = batch.sequences.clone();
    let fill = SequenceRows { rows: 1, context: 0, blocks: vec![caches.spare] };
    sequences.resize(sequences.len().next_power_of_two(), fill);
    Batch { sequences }
}

/// Layers that are read at once while those before them go to the device.
const READ_AHEAD: usize = 4;

fn load_layers<B: Backend>(backend: &B, files: &ModelFiles) -> Result<Vec<Layer<B>>> {
    let read = |index: usize| -> Result<Vec<HostProjection>> {
        let groups = layout::layer(&files.config, index).groups;
        groups.iter().map(|group| HostProjection::read(files, index, group)).collect()
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        scope.spawn(move || {
            let indices: Vec<usize> = (0..files.config.num_hidden_layers).collect();
            for window in indices.chunks(READ_AHEAD) {
                let layers: Vec<_> = window.par_iter().map(|index| (*index, read(*index))).collect();
                // The receiver is gone where a layer before could not be put on the device.
                if sender.send(layers).is_err() {
                    return;
                }
            }
        });
        let layers = receiver.into_iter().flatten();
        layers.map(|(index, groups)| Layer::new(backend, files, index, &groups?)).collect()
    })
}

/// The embedding table, `[vocab, hidden]`.
pub fn embedding<B: Backend>(backend: &B, files: &ModelFiles) -> Result<B::Weight> {
    matrix(backend, files, "model.embed_tokens.weight")
}

fn matrix<B: Backend>(backend: &B, files: &ModelFiles, name: &str) -> Result<B::Weight> {
    let shape = [files.config.vocab_size, files.config.hidden_size];
    Ok(backend.weight(&[files.checkpoint.tensor(name, &shape)?], &[])?)
}

/// Rows of the embedding table as the first layer gets them.
pub fn scaled<B: Backend>(backend: &B, config: &ModelConfig, rows: B::Tensor) -> Result<B::Tensor> {
    match config.embedding_scale(backend.element_size() == 2) {
        1.0 => Ok(rows),
        scale => Ok(backend.scale(&rows, scale)?),
    }
}

/// What a norm multiplies with, `[1, length]`.
fn norm_weight<B: Backend>(backend: &B, files: &ModelFiles, name: &str, length: usize) -> Result<B::Tensor> {
    let stored = files.checkpoint.tensor(name, &[length])?;
    Ok(match files.config.family().gemma {
        true => backend.tensor(stored.to_f32().iter().map(|w| 1.0 + w).collect(), (1, length))?,
        false => backend.tensor_from_host(&stored)?,
    })
}
