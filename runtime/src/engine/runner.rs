//! The one place where the engine calls the model.

use gptq_kernels::{Backend, Batch};

use crate::Result;
use crate::model::{Decoder, KvCaches, Model};

/// A model and the KV cache of everything that runs.
pub struct Runner<B: Backend> {
    model: Model<B>,
    caches: KvCaches<B>,
    decoder: Decoder<B>,
}

impl<B: Backend> Runner<B> {
    pub fn new(model: Model<B>, blocks: usize) -> Result<Self> {
        Ok(Self { caches: model.kv_caches(blocks)?, decoder: Decoder::default(), model })
    }

    /// One forward pass over `ids`; the logits after each of `rows`, `[rows][vocab]`.
    pub fn step(&mut self, ids: &[u32], batch: &Batch, rows: &[u32]) -> Result<Vec<Vec<f32>>> {
        let decodes = batch.sequences.iter().all(|sequence| sequence.rows == 1) && rows.len() == ids.len();
        let backend = self.model.backend();
        let logits = if decodes {
            self.model.decode(ids, batch, &mut self.caches, &mut self.decoder)?
        } else {
            let hidden = self.model.forward(ids, batch, Some(&mut self.caches))?;
            if rows.is_empty() {
                return Ok(Vec::new());
            }
            self.model.logits(&backend.gather_rows(&hidden, rows)?, 0..rows.len())?
        };
        let logits = backend.to_vec(&logits)?;
        Ok(logits.chunks_exact(logits.len() / rows.len()).map(<[f32]>::to_vec).collect())
    }
}
