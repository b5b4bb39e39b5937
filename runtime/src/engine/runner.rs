//! The one place where the engine calls the model.

use gptq_kernels::{Backend, Batch};

use crate::Result;
use crate::model::{KvCaches, Model};

/// A model and the KV cache of everything that runs.
pub struct Runner<B: Backend> {
    model: Model<B>,
    caches: KvCaches<B>,
}

impl<B: Backend> Runner<B> {
    pub fn new(model: Model<B>, blocks: usize) -> Result<Self> {
        Ok(Self { caches: model.kv_caches(blocks)?, model })
    }

    /// One forward pass over `ids`; the logits after each of `rows`, `[rows][vocab]`.
    pub fn step(&mut self, ids: &[u32], batch: &Batch, rows: &[u32]) -> Result<Vec<Vec<f32>>> {
        let hidden = self.model.forward(ids, batch, Some(&mut self.caches))?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let backend = self.model.backend();
        let hidden = backend.gather_rows(&hidden, rows)?;
        let logits = backend.to_vec(&self.model.logits(&hidden, 0..rows.len())?)?;
        Ok(logits.chunks_exact(logits.len() / rows.len()).map(<[f32]>::to_vec).collect())
    }
}
