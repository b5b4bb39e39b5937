//! What the engine runs its steps on. The engine knows sequences and blocks; where a model's weights and caches lie, on one
//! device or on several, is the executor's business alone.

mod local;

use std::ops::Range;

use gptq_kernels::{Batch, Memory, RowSampling, SampledToken};

pub use local::LocalExecutor;

use super::scheduler::Step;
use super::sequence::PromptToken;
use crate::Result;
use crate::sampling::TokenProbability;

/// A model with the KV cache of all running sequences.
pub trait Executor {
    /// Scores on the device, `[rows, vocab]`, valid until the next step.
    type Scores;

    /// Tokens that are being sampled on the device.
    type Sampled;

    /// Ids that the model has scores for.
    fn vocab(&self) -> usize;

    /// Whether a step can be queued while the device still works on the one before.
    fn is_asynchronous(&self) -> bool;

    /// Memory of the device, of several that with the least left; `None` where it is the host's.
    fn memory(&self) -> Result<Option<Memory>>;

    /// Waits for the device. An error if it is lost.
    fn synchronize(&self) -> Result<()>;

    /// Frees the cache there is and makes one of `blocks` blocks.
    fn allocate_cache(&mut self, blocks: usize) -> Result<()>;

    /// One forward pass, after which a token is drawn for each of the step's `rows`: scores that cannot decide which may
    /// be missing.
    fn step(&mut self, step: &Step, sampling: &[RowSampling]) -> Result<StepOutput<Self::Scores>>;

    /// The same of one token for each sequence of `batch` after those that are being sampled, in the same order.
    fn step_ahead(
        &mut self,
        sampled: &Self::Sampled,
        batch: &Batch,
        sampling: &[RowSampling],
    ) -> Result<Self::Scores>;

    /// Samples a token for every row of scores; returns at once where the device is asynchronous.
    fn sample(&self, scores: &Self::Scores, sampling: &[RowSampling]) -> Result<Self::Sampled>;

    /// Waits for sampled tokens; `None` for a row without a finite score.
    fn sampled_tokens(&self, sampled: &Self::Sampled) -> Result<Vec<Option<SampledToken>>>;

    /// The `count` likeliest tokens of every row of scores.
    fn top_tokens(&self, scores: &Self::Scores, count: usize) -> Result<Vec<Vec<TokenProbability>>>;
}

/// Rows of a step whose next tokens are known already.
pub struct Continued {
    pub rows: Range<usize>,
    /// The token after each row.
    pub next: Vec<u32>,
    /// Alternatives reported with each.
    pub top_n: usize,
}

/// What a step computed.
pub struct StepOutput<S> {
    /// After each of the step's `rows`; `None` where it has none.
    pub scores: Option<S>,
    /// The tokens after the rows of each of its `continued`.
    pub expected: Vec<Vec<PromptToken>>,
}
