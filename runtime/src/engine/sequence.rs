//! One sequence: what was asked, what there is so far, and where its keys lie.

use tokio::sync::mpsc::UnboundedSender;

use crate::generate::FinishReason;
use crate::sampling::{Adjustments, Sampler, SamplingParams, TokenProbability, log_probabilities};
use crate::{Error, Result};

/// A prompt to continue. Dropping the receiver of `events` cancels it.
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_new_tokens: usize,
    /// Ids that end the text.
    pub eos_token_ids: Vec<u32>,
    pub sampling: SamplingParams,
    pub adjustments: Adjustments,
    /// Alternatives reported with each token.
    pub top_n: usize,
    /// Holds at most `max_new_tokens` events and one failure.
    pub events: UnboundedSender<Event>,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Token(Token),
    /// One line; nothing comes after it.
    Failed(String),
}

/// A new token; the last one says why it is the last. The id that ends a text is reported too.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub id: u32,
    /// Natural logarithm of the model's own probability, before any sampling parameter.
    pub logprob: f32,
    /// The likeliest ids, likeliest first.
    pub top: Vec<TokenProbability>,
    pub finish: Option<FinishReason>,
}

/// A request on its way through the engine.
pub(super) struct Sequence {
    /// Prompt and generated ids.
    pub ids: Vec<u32>,
    /// How many of `ids` have their keys in the cache.
    pub context: usize,
    pub blocks: Vec<u32>,
    prompt: usize,
    request: Request,
    sampler: Sampler,
}

impl Sequence {
    pub fn new(
        mut request: Request,
        limit: usize,
    ) -> std::result::Result<Self, Box<(UnboundedSender<Event>, Error)>> {
        let ids = std::mem::take(&mut request.prompt);
        match Self::check(&ids, &request, limit) {
            Ok(sampler) => {
                Ok(Self { prompt: ids.len(), ids, context: 0, blocks: Vec::new(), sampler, request })
            }
            Err(error) => Err(Box::new((request.events, error))),
        }
    }

    fn check(ids: &[u32], request: &Request, limit: usize) -> Result<Sampler> {
        let tokens = ids.len().saturating_add(request.max_new_tokens);
        if ids.is_empty() || request.max_new_tokens == 0 || tokens > limit {
            return Err(Error::Prompt { tokens, limit });
        }
        Sampler::adjusted(request.sampling.clone(), request.adjustments.clone())
    }

    /// Tokens that must go through the model before the next one can be chosen.
    pub fn pending(&self) -> usize {
        self.ids.len() - self.context
    }

    pub fn is_cancelled(&self) -> bool {
        self.request.events.is_closed()
    }

    /// Chooses the next token and reports it; `true` when it is the last.  logits: `[vocab]`
    pub fn advance(&mut self, logits: Vec<f32>) -> bool {
        let raw = logits.clone();
        let id = self.sampler.next_after(logits, &self.ids, self.prompt);
        let (logprob, top) = log_probabilities(&raw, id, self.request.top_n);
        self.ids.push(id);
        let finish = match () {
            () if self.request.eos_token_ids.contains(&id) => Some(FinishReason::EosToken),
            () if self.ids.len() - self.prompt == self.request.max_new_tokens => Some(FinishReason::Length),
            () => None,
        };
        let heard = self.request.events.send(Event::Token(Token { id, logprob, top, finish })).is_ok();
        finish.is_some() || !heard
    }

    pub fn fail(&self, message: &str) {
        // Nobody listens when the client has gone.
        let _ = self.request.events.send(Event::Failed(message.into()));
    }
}
