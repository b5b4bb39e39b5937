//! From the last hidden states to the scores of the vocabulary.

use std::ops::Range;

use gptq_kernels::{Backend, RowSampling};

use super::{ModelFiles, embedding, matrix, norm_weight};
use crate::Result;

/// What comes after the layers. It serves by itself where no layer is loaded.
pub struct Head<B: Backend> {
    norm: B::Tensor,
    eps: f32,
    /// `[vocab, hidden]`
    pub(super) weight: B::Weight,
    /// What a family does to the scores.
    factor: f32,
    cap: Option<f32>,
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
            factor: (1.0 / config.logit_divisor) as f32,
            cap: config.logit_cap.map(|cap| cap as f32),
        })
    }

    /// `[tokens, hidden]`, ready for [`Self::logits`].
    pub fn norm(&self, backend: &B, hidden: &B::Tensor) -> Result<B::Tensor> {
        Ok(backend.rms_norm(hidden, &self.norm, self.eps)?)
    }

    /// Scores of every vocabulary entry for the given rows, `[rows, vocab]`.
    pub fn logits(&self, backend: &B, normed: &B::Tensor, rows: Range<usize>) -> Result<B::Tensor> {
        self.scores(backend, &backend.rows(normed, rows)?, None)
    }

    /// Scores of every vocabulary entry, `[rows, vocab]`; where it is said how a token is drawn for each row, those that
    /// cannot decide it may be minus infinity.
    pub(super) fn scores(
        &self,
        backend: &B,
        normed: &B::Tensor,
        sampling: Option<&[RowSampling]>,
    ) -> Result<B::Tensor> {
        let scores = match sampling {
            Some(sampling) if self.keeps_infinity() => backend.scores(normed, &self.weight, sampling)?,
            _ => backend.logits(normed, &self.weight)?,
        };
        match (self.factor, self.cap) {
            (1.0, None) => Ok(scores),
            (factor, cap) => Ok(backend.cap_scores(&scores, factor, cap)?),
        }
    }

    /// How much of the weight's memory [`Self::scores`] reads at least.
    pub(super) fn share_read(&self, backend: &B, sampling: &[RowSampling]) -> f64 {
        if self.keeps_infinity() { backend.share_read(&self.weight, sampling) } else { 1.0 }
    }

    /// A cap would make a number of what is left out.
    fn keeps_infinity(&self) -> bool {
        self.cap.is_none()
    }
}
