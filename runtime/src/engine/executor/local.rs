//! A model on one device.

use gptq_kernels::{Backend, Batch, Memory, RowSampling, SampledToken};

use super::{Continued, Executor, StepOutput};
use crate::Result;
use crate::engine::scheduler::Step;
use crate::engine::sequence::PromptToken;
use crate::model::{Decoder, KvCaches, Model};
use crate::sampling::{TokenProbability, top_probabilities};

/// Rows of a prompt whose scores exist at once: those of a vocabulary are large.
const SCORED_ROWS: usize = 256;

/// A model on one device, with its KV cache and its captured steps.
pub struct LocalExecutor<'a, B: Backend> {
    model: &'a Model<B>,
    caches: KvCaches<B>,
    decoder: Decoder<B>,
}

impl<'a, B: Backend> LocalExecutor<'a, B> {
    /// Without a cache, which is to be allocated before the first step.
    pub fn new(model: &'a Model<B>) -> Self {
        Self { model, caches: KvCaches::default(), decoder: Decoder::default() }
    }

    fn expected(&self, hidden: &B::Tensor, continued: &Continued) -> Result<Vec<PromptToken>> {
        let (backend, mut tokens) = (self.model.backend(), Vec::with_capacity(continued.next.len()));
        let mut start = continued.rows.start;
        for next in continued.next.chunks(SCORED_ROWS) {
            let logits = self.model.logits(hidden, start..start + next.len())?;
            start += next.len();
            let losses = backend.token_loss(&logits, next)?;
            let tops = self.top_tokens(&logits, continued.top_n)?;
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

impl<B: Backend> Executor for LocalExecutor<'_, B> {
    type Scores = B::Tensor;
    type Sampled = B::Sampled;

    fn vocab(&self) -> usize {
        self.model.config.vocab_size
    }

    fn is_asynchronous(&self) -> bool {
        self.model.backend().works_aside()
    }

    fn memory(&self) -> Result<Option<Memory>> {
        Ok(self.model.backend().memory()?)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(self.model.backend().synchronize()?)
    }

    fn allocate_cache(&mut self, blocks: usize) -> Result<()> {
        // Captured steps use the cache.
        (self.decoder, self.caches) = Default::default();
        self.caches = self.model.kv_caches(blocks)?;
        Ok(())
    }

    fn step(&mut self, step: &Step, sampling: &[RowSampling]) -> Result<StepOutput<B::Tensor>> {
        let Step { ids, batch, rows, continued, .. } = step;
        let decodes = batch.sequences.iter().all(|sequence| sequence.rows == 1) && rows.len() == ids.len();
        if decodes {
            let scores =
                self.model.decode(ids, batch, Some(sampling), &mut self.caches, &mut self.decoder)?;
            return Ok(StepOutput { scores: Some(scores), expected: vec![] });
        }
        let hidden = self.model.forward(ids, batch, Some(&mut self.caches))?;
        let expected = continued.iter().map(|(_, continued)| self.expected(&hidden, continued));
        let expected = expected.collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            return Ok(StepOutput { scores: None, expected });
        }
        let hidden = self.model.backend().gather_rows(&hidden, rows)?;
        Ok(StepOutput { scores: Some(self.model.scores(&hidden, Some(sampling))?), expected })
    }

    fn step_ahead(
        &mut self,
        sampled: &B::Sampled,
        batch: &Batch,
        sampling: &[RowSampling],
    ) -> Result<B::Tensor> {
        self.model.decode_sampled(sampled, batch, Some(sampling), &mut self.caches, &mut self.decoder)
    }

    fn sample(&self, scores: &B::Tensor, sampling: &[RowSampling]) -> Result<B::Sampled> {
        Ok(self.model.backend().sample(scores, sampling)?)
    }

    fn sampled_tokens(&self, sampled: &B::Sampled) -> Result<Vec<Option<SampledToken>>> {
        Ok(self.model.backend().sampled_tokens(sampled)?)
    }

    fn top_tokens(&self, scores: &B::Tensor, count: usize) -> Result<Vec<Vec<TokenProbability>>> {
        let backend = self.model.backend();
        match count.min(self.vocab()) {
            0 => Ok(vec![Vec::new(); backend.shape(scores).0]),
            count => Ok(backend.top_logits(scores, count)?.iter().map(top_probabilities).collect()),
        }
    }
}
