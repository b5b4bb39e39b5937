//! A model folder: its configs and tensors, examined before anything is loaded.

use std::path::Path;

use super::rope;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::layout::LinearSpec;
use crate::quant_config::QuantConfig;
use crate::soundness::{self, Finding, Module};
use crate::{Error, Result};

/// A checkpoint or artifact on disk: what it says of itself, and its tensors.
pub struct ModelFiles {
    pub config: ModelConfig,
    /// `None` for a checkpoint that is not quantized.
    pub quant: Option<QuantConfig>,
    pub checkpoint: Checkpoint,
    /// What is amiss with the folder without making a number wrong.
    pub notes: Vec<Finding>,
    /// Rotary angle of each pair of features per position, `[head_dim / 2]`, in layers that see everything, of a sequence that
    /// scaling by length leaves alone.
    pub inverse_frequencies: Vec<f32>,
}

impl ModelFiles {
    /// Opens a model folder whose files belong together.
    ///
    /// # Errors
    /// The first finding that would make numbers wrong. The others are in [`Self::notes`].
    pub fn open(dir: &Path) -> Result<Self> {
        let (mut files, findings) = Self::examine(dir)?;
        for finding in findings {
            match finding {
                harmless if harmless.is_harmless() => files.notes.push(harmless),
                Finding::Tensor(error) => return Err(*error),
                wrong => return Err(Error::Finding(Box::new(wrong))),
            }
        }
        Ok(files)
    }

    /// Opens a model folder and says everything that is amiss with it, what makes numbers wrong first.
    ///
    /// # Errors
    /// Files that cannot be read at all, and configs that are refused.
    pub fn examine(dir: &Path) -> Result<(Self, Vec<Finding>)> {
        let config = ModelConfig::from_file(&dir.join("config.json"))?;
        let quant = QuantConfig::read(dir)?;
        let mut files = Self {
            inverse_frequencies: rope::inverse_frequencies(&config, 0),
            checkpoint: Checkpoint::open(dir)?,
            notes: vec![],
            config,
            quant,
        };
        let own_head = files.resolve_tie()?;
        let mut findings = soundness::examine(&files.config, files.quant.as_ref(), &files.checkpoint)?;
        findings.extend(own_head);
        Ok((files, findings))
    }

    /// Of embedding and head that are said to be one, a file may hold either or both; a head that differs is one of its
    /// own, as in transformers 5.
    fn resolve_tie(&mut self) -> Result<Option<Finding>> {
        const EMBEDDING: &str = "model.embed_tokens.weight";
        const HEAD: &str = "lm_head.weight";
        if !self.config.tie_word_embeddings || !self.checkpoint.contains(HEAD) {
            return Ok(None);
        }
        if !self.checkpoint.contains(EMBEDDING) {
            self.checkpoint.rename(HEAD, EMBEDDING);
            return Ok(None);
        }
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let (embedding, head) =
            (self.checkpoint.tensor(EMBEDDING, &shape)?, self.checkpoint.tensor(HEAD, &shape)?);
        let same = embedding.dtype == head.dtype && embedding.bytes == head.bytes
            || embedding.dtype != head.dtype && embedding.to_f32() == head.to_f32();
        self.config.tie_word_embeddings = same;
        Ok((!same).then_some(Finding::OwnHead))
    }

    /// A linear of layer `index`, and how it is stored.
    pub fn module(&self, index: usize, linear: LinearSpec) -> Result<Module> {
        Module::of(&self.checkpoint, self.quant.as_ref(), index, linear)
    }

    /// All linears, layer by layer.
    pub fn modules(&self) -> Result<Vec<Module>> {
        soundness::modules(&self.config, self.quant.as_ref(), &self.checkpoint)
    }
}
