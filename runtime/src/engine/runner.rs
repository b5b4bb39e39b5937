//! The one place where the engine calls the model.

use std::ops::Range;

use gptq_kernels::{Backend, Batch, RowSampling};

use super::scheduler::Step;
use super::sequence::PromptToken;
use crate::Result;
use crate::model::{Decoder, KvCaches, Model};
use crate::sampling::{TokenProbability, top_probabilities};

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
pub struct Found<B: Backend> {
    /// Scores after each of the step's `rows`, of which there may be none, `[rows, vocab]`; until the next step.
    pub scores: Option<B::Tensor>,
    /// The tokens after the rows of each of its `continued`.
    pub expected: Vec<Vec<PromptToken>>,
}

impl<'a, B: Backend> Runner<'a, B> {
    pub fn new(model: &'a Model<B>, blocks: usize) -> Result<Self> {
        Ok(Self { caches: model.kv_caches(blocks)?, decoder: Decoder::default(), model })
    }

    pub fn device(&self) -> &B {
        self.model.backend()
    }

    pub fn vocab(&self) -> usize {
        self.model.config.vocab_size
    }

    /// One forward pass.
    pub fn step(&mut self, step: &Step) -> Result<Found<B>> {
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
        Ok(Found { scores: Some(logits), expected })
    }

    /// The scores after tokens that are still being chosen, one a sequence.
    pub fn step_ahead(&mut self, sampled: &B::Sampled, batch: &Batch) -> Result<B::Tensor> {
        self.model.decode_sampled(sampled, batch, &mut self.caches, &mut self.decoder)
    }

    /// Asks for a token after every row of scores.
    pub fn sample(&self, scores: &B::Tensor, sampling: &[RowSampling]) -> Result<B::Sampled> {
        Ok(self.device().sample(scores, sampling)?)
    }

    /// The `count` likeliest tokens after every row of scores.
    pub fn likeliest(&self, scores: &B::Tensor, count: usize) -> Result<Vec<Vec<TokenProbability>>> {
        match count.min(self.vocab()) {
            0 => Ok(vec![Vec::new(); self.device().shape(scores).0]),
            count => Ok(self.device().top_logits(scores, count)?.iter().map(top_probabilities).collect()),
        }
    }

    fn expected(&self, hidden: &B::Tensor, continued: &Continued) -> Result<Vec<PromptToken>> {
        let (backend, mut tokens) = (self.model.backend(), Vec::with_capacity(continued.next.len()));
        let mut start = continued.rows.start;
        for next in continued.next.chunks(SCORED_ROWS) {
            let logits = self.model.logits(hidden, start..start + next.len())?;
            start += next.len();
            let losses = backend.token_loss(&logits, next)?;
            let tops = self.likeliest(&logits, continued.top_n)?;
            let each = next.iter().zip(losses).zip(tops);
            tokens.extend(each.map(|((id, loss), top)| {
                // Two sums of the same masses may differ in the last place; a reader of both expects one number.
                let listed = top.iter().find(|top| top.id == *id).map(|top| top.logprob);
                PromptToken { id: *id, logprob: listed.or(Some(-loss)), top }
            }));
        }
        Ok(tokens)
    }
}
