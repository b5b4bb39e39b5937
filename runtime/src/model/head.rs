//! From the last hidden states to the scores of the vocabulary.

use std::ops::Range;

use gptq_kernels::Backend;

use super::{ModelFiles, embedding, matrix, norm_weight};
use crate::Result;
use crate::config::ModelConfig;

/// What comes after the layers, by itself: for a model of which no layer is loaded.
pub struct Head<B: Backend> {
    norm: B::Tensor,
    eps: f32,
    /// `[vocab, hidden]`
    weight: B::Weight,
    scores: Scores,
}

/// What a family does to the vocabulary's scores.
#[derive(Clone, Copy)]
pub(super) struct Scores {
    factor: f32,
    cap: Option<f32>,
}

impl Scores {
    pub fn of(config: &ModelConfig) -> Self {
        Self { factor: (1.0 / config.logit_divisor) as f32, cap: config.logit_cap.map(|cap| cap as f32) }
    }

    /// A cap would make a number of what is left out.
    pub fn keeps_infinity(self) -> bool {
        self.cap.is_none()
    }

    pub fn of_vocabulary<B: Backend>(self, backend: &B, logits: B::Tensor) -> Result<B::Tensor> {
        match self {
            Self { factor: 1.0, cap: None } => Ok(logits),
            Self { factor, cap } => Ok(backend.cap_scores(&logits, factor, cap)?),
        }
    }
}

impl<B: Backend> Head<B> {
    pub fn load(backend: &B, files: &ModelFiles) -> Result<Self> {
        let config = &files.config;
        Ok(Self {
            norm: norm_weight(backend, files, "model.norm.weight", config.hidden_size)?,
            eps: config.rms_norm_eps as f32,
            weight: match config.tie_word_embeddings {
                true => embedding(backend, files)?,
                false => matrix(backend, files, "lm_head.weight")?,
            },
            scores: Scores::of(config),
        })
    }

    /// `[tokens, hidden]`, ready for [`Self::logits`].
    pub fn norm(&self, backend: &B, hidden: &B::Tensor) -> Result<B::Tensor> {
        Ok(backend.rms_norm(hidden, &self.norm, self.eps)?)
    }

    /// Scores of every vocabulary entry for the given rows, `[rows, vocab]`.
    pub fn logits(&self, backend: &B, normed: &B::Tensor, rows: Range<usize>) -> Result<B::Tensor> {
        let logits = backend.logits(&backend.rows(normed, rows)?, &self.weight)?;
        self.scores.of_vocabulary(backend, logits)
    }
}
