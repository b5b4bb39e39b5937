//! Generation for one sequence over a KV cache. Token ids in, token ids out: text is not known here.

use std::ops::ControlFlow;

use gptq_kernels::{Backend, Batch, KV_BLOCK_ROWS, SequenceRows};

use crate::model::{Decoder, KvCaches, Model};
use crate::sampling::{Sampler, SamplingParams};
use crate::{Error, Result};

/// Prompt tokens of one forward pass; longer prompts are taken in chunks.
const PREFILL_ROWS: usize = 2048;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// `max_new_tokens` were made, or the context is full.
    Length,
    /// The model ended its text.
    EosToken,
    /// The caller saw enough, for instance a stop string.
    StopSequence,
}

/// How long and until when to generate.
#[derive(Clone, Debug)]
pub struct GenerateParams {
    pub max_new_tokens: usize,
    /// Ids that end the text; they are not part of it.
    pub eos_token_ids: Vec<u32>,
    pub sampling: SamplingParams,
}

/// Generates after `prompt`; `on_token` sees each new id and may stop.
pub fn generate<B: Backend>(
    model: &Model<B>,
    prompt: &[u32],
    params: &GenerateParams,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<FinishReason> {
    let limit = model.config.max_position_embeddings;
    if prompt.is_empty() || prompt.len() >= limit {
        return Err(Error::Prompt { tokens: prompt.len(), limit });
    }
    let length = prompt.len().saturating_add(params.max_new_tokens).min(limit);
    let mut sampler = Sampler::new(params.sampling.clone())?;
    let mut sequence = Sequence::new(model, length)?;
    let mut seen = prompt.to_vec();
    let mut logits = sequence.feed(prompt)?;
    while seen.len() < length {
        let id = next(model.backend(), &mut sampler, &logits, &seen)?;
        if params.eos_token_ids.contains(&id) {
            return Ok(FinishReason::EosToken);
        }
        seen.push(id);
        if on_token(id).is_break() {
            return Ok(FinishReason::StopSequence);
        }
        if seen.len() == length {
            break;
        }
        logits = sequence.decode(id)?;
    }
    Ok(FinishReason::Length)
}

/// Chooses from the few likeliest tokens where they decide, so that the scores of all stay on the device.
/// logits: `[1, vocab]`
fn next<B: Backend>(backend: &B, sampler: &mut Sampler, logits: &B::Tensor, seen: &[u32]) -> Result<u32> {
    if let Some(count) = sampler.candidates(backend.shape(logits).1) {
        let likeliest = backend.top_logits(logits, count, &[sampler.temperature()])?;
        if let Some(id) = likeliest.first().and_then(|likeliest| sampler.choose(likeliest, seen, 0)) {
            return Ok(id);
        }
    }
    Ok(sampler.next(backend.to_vec(logits)?, seen))
}

/// A sequence and its keys and values.
struct Sequence<'a, B: Backend> {
    model: &'a Model<B>,
    caches: KvCaches<B>,
    blocks: Vec<u32>,
    context: usize,
    decoder: Decoder<B>,
}

impl<'a, B: Backend> Sequence<'a, B> {
    fn new(model: &'a Model<B>, length: usize) -> Result<Self> {
        let blocks = length.div_ceil(KV_BLOCK_ROWS);
        Ok(Self {
            caches: model.kv_caches(blocks)?,
            blocks: (0..blocks as u32).collect(),
            context: 0,
            decoder: Decoder::default(),
            model,
        })
    }

    /// Appends one token and returns the logits after it.
    fn decode(&mut self, id: u32) -> Result<B::Tensor> {
        let sequences = vec![SequenceRows { rows: 1, context: self.context, blocks: self.blocks.clone() }];
        let batch = Batch { sequences };
        let logits = self.model.decode(&[id], &batch, &mut self.caches, &mut self.decoder)?;
        self.context += 1;
        Ok(logits)
    }

    /// Appends tokens and returns the logits after the last one.
    fn feed(&mut self, ids: &[u32]) -> Result<B::Tensor> {
        let mut last = None;
        for ids in ids.chunks(PREFILL_ROWS) {
            let sequences =
                vec![SequenceRows { rows: ids.len(), context: self.context, blocks: self.blocks.clone() }];
            let hidden = self.model.forward(ids, &Batch { sequences }, Some(&mut self.caches))?;
            self.context += ids.len();
            last = Some((hidden, ids.len() - 1));
        }
        let (hidden, row) =
            last.ok_or(Error::Prompt { tokens: 0, limit: self.blocks.len() * KV_BLOCK_ROWS })?;
        self.model.logits(&hidden, row..row + 1)
    }
}
