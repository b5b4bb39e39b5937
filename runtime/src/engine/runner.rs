//! The one place where the engine calls the model.

use std::ops::Range;

use gptq_kernels::{Backend, Likeliest};

use super::scheduler::Step;
use super::sequence::PromptToken;
use crate::Result;
use crate::model::{Decoder, KvCaches, Model};
use crate::sampling::top_probabilities;

/// Rows of a prompt whose scores exist at once: those of a vocabulary are large.
const SCORED_ROWS: usize = 256;

/// A model and the KV cache of everything that runs.
pub struct Runner<'a, B: Backend> {
    model: &'a Model<B>,
    caches: KvCaches<B>,
    decoder: Decoder<B>,
}

/// Rows of a step whose next tokens are known already.
pub struct Continued {
    pub rows: Range<usize>,
    /// The token after each row.
    pub next: Vec<u32>,
    /// Alternatives reported with each.
    pub top_n: usize,
}

/// What one step found.
pub struct Found<'a, B: Backend> {
    /// After each of the step's `rows`, of which there may be none.
    pub scores: Option<Scores<'a, B>>,
    /// The tokens after the rows of each of its `continued`.
    pub expected: Vec<Vec<PromptToken>>,
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

    /// One forward pass.
    pub fn step(&mut self, step: &Step) -> Result<Found<'_, B>> {
        let Step { ids, batch, rows, continued, .. } = step;
        let mut expected = Vec::new();
        let decodes = batch.sequences.iter().all(|sequence| sequence.rows == 1) && rows.len() == ids.len();
        let logits = if decodes {
            self.model.decode(ids, batch, &mut self.caches, &mut self.decoder)?
        } else {
            let hidden = self.model.forward(ids, batch, Some(&mut self.caches))?;
            for (_, continued) in continued {
                expected.push(self.expected(&hidden, continued)?);
            }
            if rows.is_empty() {
                return Ok(Found { scores: None, expected });
            }
            let hidden = self.model.backend().gather_rows(&hidden, rows)?;
            self.model.logits(&hidden, 0..rows.len())?
        };
        let scores = Some(Scores { backend: self.model.backend(), logits });
        Ok(Found { scores, expected })
    }

    fn expected(&self, hidden: &B::Tensor, continued: &Continued) -> Result<Vec<PromptToken>> {
        let (backend, mut tokens) = (self.model.backend(), Vec::with_capacity(continued.next.len()));
        let mut start = continued.rows.start;
        for next in continued.next.chunks(SCORED_ROWS) {
            let logits = self.model.logits(hidden, start..start + next.len())?;
            start += next.len();
            let losses = backend.token_loss(&logits, next)?;
            let tops = match continued.top_n.min(backend.shape(&logits).1) {
                0 => vec![Vec::new(); next.len()],
                count => {
                    let likeliest = backend.top_logits(&logits, count, &vec![1.0; next.len()])?;
                    likeliest.iter().map(top_probabilities).collect()
                }
            };
            let each = next.iter().zip(losses).zip(tops);
            tokens.extend(each.map(|((id, loss), top)| PromptToken { id: *id, logprob: Some(-loss), top }));
        }
        Ok(tokens)
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
