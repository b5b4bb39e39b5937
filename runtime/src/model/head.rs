//! From the last hidden states to the scores of the vocabulary.

use std::ops::Range;

use gptq_kernels::Backend;

use super::{ModelFiles, embedding, matrix, vector};
use crate::Result;

/// What comes after the layers, by itself: for a model of which no layer is loaded.
pub struct Head<B: Backend> {
    norm: B::Tensor,
    eps: f32,
    /// `[vocab, hidden]`
    weight: B::Weight,
}

impl<B: Backend> Head<B> {
    pub fn load(backend: &B, files: &ModelFiles) -> Result<Self> {
        let config = &files.config;
        Ok(Self {
            norm: vector(backend, files, "model.norm.weight", config.hidden_size)?,
            eps: config.rms_norm_eps as f32,
            weight: match config.tie_word_embeddings {
                true => embedding(backend, files)?,
                false => matrix(backend, files, "lm_head.weight")?,
            },
        })
    }

    /// `[tokens, hidden]`, ready for [`Self::logits`].
    pub fn norm(&self, backend: &B, hidden: &B::Tensor) -> Result<B::Tensor> {
        Ok(backend.rms_norm(hidden, &self.norm, self.eps)?)
    }

    /// Scores of every vocabulary entry for the given rows, `[rows, vocab]`.
    pub fn logits(&self, backend: &B, normed: &B::Tensor, rows: Range<usize>) -> Result<B::Tensor> {
        Ok(backend.logits(&backend.rows(normed, rows)?, &self.weight)?)
    }
}
