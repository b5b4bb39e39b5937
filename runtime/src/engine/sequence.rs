//! One sequence: what was asked, what there is so far, and where its keys lie.

use std::ops::Range;
use std::time::Instant;

use gptq_kernels::{MOST_CANDIDATES, RowSampling, SampledToken};

use super::blocks::CachedPrefix;
use super::listener::Listener;
use crate::generate::FinishReason;
use crate::sampling::{Adjustments, Sampler, SamplingParams, TokenProbability};
use crate::{Error, Result};

/// A prompt, and how to continue it.
#[derive(Clone, Debug)]
pub struct Task {
    pub prompt: Vec<u32>,
    /// 0, with `prompt_logprobs`, where the prompt alone is wanted.
    pub max_new_tokens: usize,
    /// Before so many tokens no id ends the text.
    pub min_new_tokens: usize,
    /// Ids that end the text.
    pub eos_token_ids: Vec<u32>,
    pub sampling: SamplingParams,
    pub adjustments: Adjustments,
    /// Tokens are reported with their log-probabilities.
    pub logprobs: bool,
    /// Alternatives reported with each token.
    pub top_n: usize,
    /// The prompt's tokens are reported too, which the prefix cache then cannot serve.
    pub prompt_logprobs: bool,
}

impl Task {
    /// Without ends, adjustments and anything reported beside the tokens and their log-probabilities.
    pub fn new(prompt: Vec<u32>, max_new_tokens: usize, sampling: SamplingParams) -> Self {
        Self {
            prompt,
            max_new_tokens,
            min_new_tokens: 0,
            eos_token_ids: Vec::new(),
            sampling,
            adjustments: Adjustments::default(),
            logprobs: true,
            top_n: 0,
            prompt_logprobs: false,
        }
    }
}

/// A task, and where its events go.
pub struct Request {
    pub task: Task,
    pub events: Box<dyn Listener>,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It left the queue. Said once.
    Started(Instant),
    /// The whole prompt where its probabilities are wanted; before the first token, and last where no token is.
    Prompt(Vec<PromptToken>),
    Token(Token),
    /// One line; nothing comes after it.
    Failed(String),
}

/// A token of the prompt, as the model expected it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    pub id: u32,
    /// Natural logarithm of the model's own probability; none for the first token, before which there is nothing.
    pub logprob: Option<f32>,
    /// What was likeliest in its place, likeliest first.
    pub top: Vec<TokenProbability>,
}

/// A new token; the last one says why it is the last. The id that ends a text is reported too.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: u32,
    /// Natural logarithm of the model's own probability, before any sampling parameter; of no meaning where the task does
    /// not want it.
    pub logprob: f32,
    /// The likeliest ids, likeliest first.
    pub top: Vec<TokenProbability>,
    pub finish: Option<FinishReason>,
}

/// A request that cannot be served.
pub(super) struct Refused {
    pub events: Box<dyn Listener>,
    pub error: Error,
}

/// A request on its way through the engine.
pub(super) struct Sequence {
    /// No two have the same.
    pub serial: u64,
    /// Prompt and generated ids.
    pub ids: Vec<u32>,
    /// How many tokens have their keys in the cache: of `ids`, and one that is still being sampled where a step was
    /// scheduled ahead.
    pub context: usize,
    pub blocks: Vec<u32>,
    pub prefix: CachedPrefix,
    /// The prompt as far as its probabilities are known; `None` where the request does not want them, or they have been
    /// reported.
    pub expected: Option<Vec<PromptToken>>,
    prompt: usize,
    started: bool,
    request: Request,
    sampler: Sampler,
}

impl Sequence {
    /// `limit`: tokens of prompt and answer at most; `vocab`: of the model.
    pub fn new(
        mut request: Request,
        serial: u64,
        (limit, vocab): (usize, usize),
    ) -> std::result::Result<Self, Box<Refused>> {
        match Self::check(&request.task, limit, vocab) {
            Ok(sampler) => {
                let ids = std::mem::take(&mut request.task.prompt);
                let (prompt, blocks, prefix) = (ids.len(), Vec::new(), CachedPrefix::default());
                let first = PromptToken { id: ids[0], logprob: None, top: Vec::new() };
                let expected = request.task.prompt_logprobs.then(|| vec![first]);
                Ok(Self {
                    serial,
                    ids,
                    context: 0,
                    blocks,
                    prefix,
                    expected,
                    prompt,
                    started: false,
                    sampler,
                    request,
                })
            }
            Err(error) => Err(Box::new(Refused { events: request.events, error })),
        }
    }

    fn check(task: &Task, limit: usize, vocab: usize) -> Result<Sampler> {
        let tokens = task.prompt.len().saturating_add(task.max_new_tokens);
        let wanted = task.max_new_tokens > 0 || task.prompt_logprobs;
        if task.prompt.is_empty() || !wanted || tokens > limit {
            return Err(Error::Prompt { tokens, limit });
        }
        if let Some(id) = task.prompt.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::PromptId { id: *id, vocab });
        }
        let (name, expected) = ("alternatives of a token", "at most 64");
        if task.top_n > MOST_CANDIDATES {
            return Err(Error::Parameter { name, expected, got: task.top_n as f32 });
        }
        let (name, expected) = ("logit_bias", "ids of the vocabulary");
        if let Some((id, _)) = task.adjustments.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            return Err(Error::Parameter { name, expected, got: *id as f32 });
        }
        let mut sampler = Sampler::adjusted(task.sampling.clone(), task.adjustments.clone())?;
        // An id beyond the vocabulary is never drawn.
        let ends = task.eos_token_ids.iter().copied().filter(|id| (*id as usize) < vocab);
        let least = task.prompt.len().saturating_add(task.min_new_tokens);
        sampler.forbid_before(least, &ends.collect::<Vec<_>>());
        Ok(sampler)
    }

    /// Whether it ends with its prompt: the token drawn after it is discarded.
    pub fn only_scores(&self) -> bool {
        self.request.task.max_new_tokens == 0
    }

    /// Tokens that must go through the model before the next one can be chosen.
    pub fn pending(&self) -> usize {
        self.ids.len() - self.context
    }

    /// The beginning that may come from the cache: a token whose probability is wanted must be computed.
    pub fn reusable(&self) -> &[u32] {
        &self.ids[..self.expected.as_ref().map_or(self.ids.len(), Vec::len)]
    }

    /// Of the places `from` to `to`, which are computed now, those after which a token's probability is wanted.
    pub fn unknown(&self, from: usize, to: usize) -> Option<Range<usize>> {
        let known = self.expected.as_ref()?.len();
        let places = from.max(known - 1)..to.min(self.prompt - 1);
        (!places.is_empty()).then_some(places)
    }

    pub fn top_n(&self) -> usize {
        self.request.task.top_n
    }

    pub fn is_cancelled(&self) -> bool {
        self.request.events.is_gone()
    }

    /// Says that it left the queue; one that was preempted and comes back has said so.
    pub fn start(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.say(Event::Started(Instant::now()));
        }
    }

    /// How the next token is drawn.
    pub fn next_sampling(&mut self) -> RowSampling {
        let row = self.sampler.next_row(&self.ids, self.prompt);
        RowSampling { logprob: self.wants_logprob(), ..row }
    }

    /// How the token after the one that is being sampled is drawn; for a sequence that [`Self::is_predictable`].
    pub fn sampling_ahead(&mut self) -> RowSampling {
        let row = self.sampler.row_at(self.ids.len() + 1);
        RowSampling { logprob: self.wants_logprob(), ..row }
    }

    /// Whether more is reported of a token than its id.
    fn wants_logprob(&self) -> bool {
        self.request.task.logprobs || self.top_n() > 0
    }

    /// Whether there is a token after the one that is being sampled, as far as can be known, and everything about it but
    /// its scores is known.
    pub fn is_predictable(&self) -> bool {
        let more = self.ids.len() + 1 - self.prompt < self.request.task.max_new_tokens;
        more && !self.sampler.remembers() && self.top_n() == 0
    }

    /// Appends and reports the next token, `None` where the model had no score; `true` when it is the last.
    pub fn take(&mut self, token: Option<SampledToken>, top: Vec<TokenProbability>) -> bool {
        if self.only_scores() {
            let prompt = self.expected.take().unwrap_or_default();
            self.say(Event::Prompt(prompt));
            return true;
        }
        let Some(SampledToken { id, logprob }) = token else {
            self.fail(&Error::NoScore { place: self.ids.len() }.to_string());
            return true;
        };
        if let Some(prompt) = self.expected.take() {
            self.say(Event::Prompt(prompt));
        }
        // Two sums of the same masses may differ in the last place; a reader of both expects one number.
        let logprob = top.iter().find(|top| top.id == id).map_or(logprob, |top| top.logprob);
        let task = &self.request.task;
        self.ids.push(id);
        let finish = match () {
            () if task.eos_token_ids.contains(&id) => Some(FinishReason::EosToken),
            () if self.ids.len() - self.prompt == task.max_new_tokens => Some(FinishReason::Length),
            () => None,
        };
        self.say(Event::Token(Token { id, logprob, top, finish }));
        finish.is_some()
    }

    pub fn fail(&self, message: &str) {
        self.say(Event::Failed(message.into()));
    }

    fn say(&self, event: Event) {
        self.request.events.take(event);
    }
}
