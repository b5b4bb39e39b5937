//! The one place where the engine calls the model.

use gptq_kernels::{Backend, Batch, Likeliest};

use crate::Result;
use crate::model::{Decoder, KvCaches, Model};

/// A model and the KV cache of everything that runs.
pub struct Runner<'a, B: Backend> {
    model: &'a Model<B>,
    caches: KvCaches<B>,
    decoder: Decoder<B>,
}

/// The logits after some rows, still on the device; until the next step.
pub struct Scores<'a, B: Backend> {
    backend: &'a B,
    /// `[rows, vocab]`
    logits: B::Tensor,
}

impl<'a, B: Backend> Runner<'a, B> {
    pub fn new(model: &'a Model<B>, blocks: usize) -> Result<Self> {
        Ok(Self { caches: model.kv_caches(blocks)?, decoder: Decoder::default(), model })
    }

    pub fn device(&self) -> &B {
        self.model.backend()
    }

    /// One forward pass over `ids`; the scores after each of `rows`, of which there may be none.
    pub fn step(&mut self, ids: &[u32], batch: &Batch, rows: &[u32]) -> Result<Option<Scores<'_, B>>> {
        let decodes = batch.sequences.iter().all(|sequence| sequence.rows == 1) && rows.len() == ids.len();
        let logits = if decodes {
            self.model.decode(ids, batch, &mut self.caches, &mut self.decoder)?
        } else {
            let hidden = self.model.forward(ids, batch, Some(&mut self.caches))?;
            if rows.is_empty() {
                return Ok(None);
            }
            let hidden = self.model.backend().gather_rows(&hidden, rows)?;
            self.model.logits(&hidden, 0..rows.len())?
        };
        Ok(Some(Scores { backend: self.model.backend(), logits }))
    }
}

impl<B: Backend> Scores<'_, B> {
    pub fn vocab(&self) -> usize {
        self.backend.shape(&self.logits).1
    }

    /// The `count` likeliest tokens of every row.
    pub fn likeliest(&self, count: usize, temperatures: &[f32]) -> Result<Vec<Likeliest>> {
        Ok(self.backend.top_logits(&self.logits, count, temperatures)?)
    }

    /// All scores of one row, `[vocab]`.
    pub fn row(&self, row: usize) -> Result<Vec<f32>> {
        Ok(self.backend.to_vec(&self.backend.rows(&self.logits, row..row + 1)?)?)
    }
}
