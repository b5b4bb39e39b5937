//! Generation for one sequence over a KV cache. Token ids in, token ids out: text is not known here.

use std::ops::ControlFlow;

use gptq_kernels::{Backend, Batch, KV_BLOCK_ROWS, RowSampling, SequenceRows};

use crate::model::{Decoder, KvCaches, Model};
use crate::sampling::{Adjustments, Sampler, SamplingParams};
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
    /// Before so many tokens no id ends the text.
    pub min_new_tokens: usize,
    /// Ids that end the text; they are not part of it. Each is one of the vocabulary.
    pub eos_token_ids: Vec<u32>,
    pub sampling: SamplingParams,
    pub adjustments: Adjustments,
}

impl GenerateParams {
    /// Without a least number of tokens, and without adjustments.
    pub fn new(max_new_tokens: usize, eos_token_ids: Vec<u32>, sampling: SamplingParams) -> Self {
        Self {
            max_new_tokens,
            min_new_tokens: 0,
            eos_token_ids,
            sampling,
            adjustments: Adjustments::default(),
        }
    }
}

/// Generates after `prompt`; `on_token` sees each new id and may stop.
pub fn generate<B: Backend>(
    model: &Model<B>,
    prompt: &[u32],
    params: &GenerateParams,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<FinishReason> {
    Session::new(model, 0).generate(prompt, params, on_token)
}

/// A text that grows by turns: what a prompt has in common with the text before it is not computed again.
pub struct Session<'a, B: Backend> {
    model: &'a Model<B>,
    /// The text before; none at first, and none after a failure.
    sequence: Option<Sequence<'a, B>>,
    /// Tokens that the next cache has room for at least.
    room: usize,
    computed: usize,
}

impl<'a, B: Backend> Session<'a, B> {
    /// `room`: tokens of a text that is not expected to need a larger cache; 0 where there is one prompt only.
    pub fn new(model: &'a Model<B>, room: usize) -> Self {
        Self { model, sequence: None, room, computed: 0 }
    }

    /// Tokens of the last prompt that went through the model.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Generates after `prompt`, which is the whole text so far; `on_token` sees each new id and may stop.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        params: &GenerateParams,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<FinishReason> {
        let limit = self.model.config.context_length();
        if prompt.is_empty() || prompt.len() >= limit {
            return Err(Error::Prompt { tokens: prompt.len(), limit });
        }
        let length = prompt.len().saturating_add(params.max_new_tokens).min(limit);
        let mut sampler = Sampler::adjusted(params.sampling.clone(), params.adjustments.clone())?;
        sampler.forbid_before(prompt.len().saturating_add(params.min_new_tokens), &params.eos_token_ids);
        let mut sequence = self.sequence(length)?;
        let known = sequence.keep(prompt);
        self.computed = prompt.len() - known;
        let logits = sequence.feed(&prompt[known..])?;
        let reason = sequence.go_on(prompt, logits, length, sampler, &params.eos_token_ids, on_token)?;
        self.sequence = Some(sequence);
        Ok(reason)
    }

    /// The text before, in a cache with room for `length` tokens. One that is too small is given up for one at least
    /// twice as large, so that a long conversation is computed anew only a few times.
    fn sequence(&mut self, length: usize) -> Result<Sequence<'a, B>> {
        match self.sequence.take() {
            Some(sequence) if sequence.room() >= length => return Ok(sequence),
            Some(sequence) => self.room = 2 * sequence.room(),
            None => {}
        }
        Sequence::new(self.model, length.max(self.room).min(self.model.config.context_length()))
    }
}

/// A sequence and its keys and values.
struct Sequence<'a, B: Backend> {
    model: &'a Model<B>,
    caches: KvCaches<B>,
    blocks: Vec<u32>,
    /// What is in the cache.
    ids: Vec<u32>,
    decoder: Decoder<B>,
}

impl<'a, B: Backend> Sequence<'a, B> {
    fn new(model: &'a Model<B>, length: usize) -> Result<Self> {
        let blocks = length.div_ceil(KV_BLOCK_ROWS);
        Ok(Self {
            caches: model.kv_caches(blocks)?,
            blocks: (0..blocks as u32).collect(),
            ids: Vec::new(),
            decoder: Decoder::default(),
            model,
        })
    }

    fn room(&self) -> usize {
        self.blocks.len() * KV_BLOCK_ROWS
    }

    /// Forgets all but what `prompt` begins with, and that much is known of it: never all, since the logits after the
    /// last token are wanted.
    fn keep(&mut self, prompt: &[u32]) -> usize {
        let common = self.ids.iter().zip(prompt).take_while(|(old, new)| old == new).count();
        self.ids.truncate(common.min(prompt.len() - 1));
        self.ids.len()
    }

    /// Chooses tokens after `prompt`, the first one by `logits`, until there are `length` in all. Where the device works
    /// beside the host, and a token does not depend on what those before it were but by the scores, the next step is asked
    /// for before the token of this one is known; after the last token it was in vain.
    fn go_on(
        &mut self,
        prompt: &[u32],
        logits: B::Tensor,
        length: usize,
        mut sampler: Sampler,
        eos_token_ids: &[u32],
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<FinishReason> {
        let model = self.model;
        let backend = model.backend();
        let ahead = backend.works_aside() && !sampler.remembers();
        let mut seen = prompt.to_vec();
        let mut sampled = backend.sample(&logits, &[sampler.next_row(&seen, prompt.len())])?;
        while seen.len() < length {
            let next = match ahead && seen.len() + 1 < length {
                true => Some(self.decode_sampled(&sampled, &mut sampler, seen.len() + 1)?),
                false => None,
            };
            let token = backend.sampled_tokens(&sampled)?.pop().flatten();
            let id = token.ok_or(Error::NoScore { place: seen.len() })?.id;
            if eos_token_ids.contains(&id) {
                return Ok(FinishReason::EosToken);
            }
            seen.push(id);
            if on_token(id).is_break() {
                return Ok(FinishReason::StopSequence);
            }
            if seen.len() == length {
                break;
            }
            // What is in the cache is known only now.
            self.ids.push(id);
            sampled = match next {
                Some(next) => next,
                None => {
                    let row = [sampler.next_row(&seen, prompt.len())];
                    backend.sample(&self.decode(id, &row)?, &row)?
                }
            };
        }
        Ok(FinishReason::Length)
    }

    /// The scores after the last token of `ids`, which is not in the cache yet.
    fn decode(&mut self, id: u32, sampling: &[RowSampling]) -> Result<B::Tensor> {
        let batch = self.batch(self.ids.len() - 1, 1);
        self.model.decode(&[id], &batch, Some(sampling), &mut self.caches, &mut self.decoder)
    }

    /// Asks for the token at `place`, after one that is still being sampled.
    fn decode_sampled(
        &mut self,
        sampled: &B::Sampled,
        sampler: &mut Sampler,
        place: usize,
    ) -> Result<B::Sampled> {
        let (batch, row) = (self.batch(place - 1, 1), [sampler.row_at(place)]);
        let (caches, decoder) = (&mut self.caches, &mut self.decoder);
        let logits = self.model.decode_sampled(sampled, &batch, Some(&row), caches, decoder)?;
        Ok(self.model.backend().sample(&logits, &row)?)
    }

    /// Appends tokens and returns the logits after the last one.
    fn feed(&mut self, ids: &[u32]) -> Result<B::Tensor> {
        let mut last = None;
        for ids in ids.chunks(PREFILL_ROWS) {
            let batch = self.batch(self.ids.len(), ids.len());
            let hidden = self.model.forward(ids, &batch, Some(&mut self.caches))?;
            self.ids.extend_from_slice(ids);
            last = Some((hidden, ids.len() - 1));
        }
        let (hidden, row) = last.ok_or(Error::Prompt { tokens: 0, limit: self.room() })?;
        self.model.logits(&hidden, row..row + 1)
    }

    /// `rows` tokens after the first `context`.
    fn batch(&self, context: usize, rows: usize) -> Batch {
        let sequence = SequenceRows { rows, context, blocks: self.blocks.clone() };
        Batch { sequences: vec![sequence] }
    }
}

#[cfg(test)]
mod tests {
    use gptq_kernels::Cpu;

    use super::*;
    use crate::engine::tests::{folder, model};

    /// What a session says after `prompt`, which is what is said without one; and what it computed of the prompt.
    fn say(session: &mut Session<'_, Cpu>, prompt: &[u32], params: &GenerateParams) -> (Vec<u32>, usize) {
        let (mut kept, mut alone) = (Vec::new(), Vec::new());
        let mut hear = |id| (kept.push(id), ControlFlow::Continue(())).1;
        let reason = session.generate(prompt, params, &mut hear).unwrap();
        let mut hear = |id| (alone.push(id), ControlFlow::Continue(())).1;
        assert_eq!(generate(session.model, prompt, params, &mut hear).unwrap(), reason);
        assert_eq!(kept, alone);
        (kept, session.computed())
    }

    fn params(max_new_tokens: usize) -> GenerateParams {
        let sampling =
            SamplingParams { temperature: 0.8, top_p: 0.9, top_k: 40, repetition_penalty: 1.1, seed: 3 };
        GenerateParams::new(max_new_tokens, vec![7], sampling)
    }

    #[test]
    fn a_next_turn_computes_what_is_new_until_the_cache_is_too_small_and_no_answer_changes() {
        let folder = folder();
        let model = model(folder.path());
        let mut session = Session::new(&model, 0);
        let (mut prompt, mut computed) = (Vec::new(), Vec::new());
        for turn in 0..8 {
            prompt.extend([10 + turn; 12]);
            let (answer, tokens) = say(&mut session, &prompt, &params(10));
            computed.push((tokens, prompt.len()));
            prompt.extend(answer);
        }
        // The last token of an answer was never computed.
        let (anew, kept): (Vec<_>, Vec<_>) = computed.iter().partition(|(tokens, all)| tokens == all);
        assert!(kept.iter().all(|(tokens, _)| *tokens <= 13), "{computed:?}");
        assert_eq!((anew.len(), kept.len()), (4, 4), "room for 32, 64, 128 and 256 tokens: {computed:?}");
    }

    #[test]
    fn no_text_ends_before_it_has_its_least_number_of_tokens() {
        let folder = folder();
        let model = model(folder.path());
        let mut session = Session::new(&model, 0);
        let prompt: Vec<u32> = (20..40).collect();
        let (free, _) =
            say(&mut session, &prompt, &GenerateParams::new(12, Vec::new(), SamplingParams::greedy()));
        let mut ends = GenerateParams::new(12, vec![free[2]], SamplingParams::greedy());
        let first = free.iter().position(|id| *id == free[2]).unwrap();
        assert_eq!(say(&mut session, &prompt, &ends).0.len(), first);
        ends.min_new_tokens = 5;
        let (longer, _) = say(&mut session, &prompt, &ends);
        assert!(longer.len() >= 5 && !longer.contains(&free[2]), "{longer:?}");
    }

    #[test]
    fn a_text_that_turns_out_differently_is_computed_from_there() {
        let folder = folder();
        let model = model(folder.path());
        let mut session = Session::new(&model, 0);
        let mut computed = |prompt: &[u32]| say(&mut session, prompt, &params(8)).1;
        let text: Vec<u32> = (20..60).collect();
        assert_eq!(computed(&text), 40);
        assert_eq!(computed(&text), 1, "the last token is always computed");
        let mut other = text.clone();
        other[25] = 90;
        assert_eq!(computed(&other), 15);
        assert_eq!(computed(&other[..20]), 1);
    }
}
