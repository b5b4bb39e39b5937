//! What OpenAI's clients get, whole or in pieces.

use std::convert::Infallible;

use axum::response::Response;
use axum::response::sse::Event as SseEvent;
use futures_util::stream::{self, SelectAll, StreamExt};
use gptq_runtime::engine::Token;
use gptq_runtime::generate::FinishReason;
use gptq_runtime::sampling::TokenProbability;
use serde_json::{Map, Value, json};

use super::calls::Calls;
use super::tool_calls::ToolFormat;
use crate::error::{ApiError, Dialect};
use crate::generation::{Generation, Step};
use crate::{Call, access, sse, unix_time};

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Text,
}

/// What an answer is made of, besides its tokens.
pub struct Frame {
    pub kind: Kind,
    id: String,
    created: u64,
    pub prompt_tokens: usize,
    pub logprobs: bool,
    /// How the answer may call functions.
    pub calls: Option<ToolFormat>,
    /// Choices of each prompt.
    pub n: usize,
    /// What stands before the answers to each prompt; nothing where there are fewer.
    pub echoes: Vec<String>,
    pub include_usage: bool,
}

impl Frame {
    pub fn new(kind: Kind, logprobs: bool) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{}", access::new_id());
        let created = unix_time();
        let (prompt_tokens, calls, n, echoes, include_usage) = (0, None, 1, Vec::new(), false);
        Self { kind, id, created, prompt_tokens, logprobs, calls, n, echoes, include_usage }
    }

    fn echo(&self, index: usize) -> &str {
        self.echoes.get(index / self.n).map_or("", String::as_str)
    }

    pub fn object(&self, call: &Call, choices: Vec<Value>, chunk: bool) -> Value {
        let object = match (self.kind, chunk) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": call.info.model_id,
            "system_fingerprint": call.info.version, "choices": choices})
    }

    pub fn usage(&self, completion: usize) -> Value {
        json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion})
    }

    /// A whole answer.
    pub fn choice(&self, call: &Call, index: usize, steps: &[Step]) -> Value {
        let echo = self.echo(index);
        let text = steps.iter().fold(echo.to_owned(), |text, step| text + &step.text);
        let finish = steps.last().and_then(|step| step.finish).map(finish_reason);
        let logprobs = self.logprobs(call, steps, echo.chars().count());
        match self.kind {
            Kind::Chat => {
                let (message, finish) = self.message(&text, finish);
                json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
            }
            Kind::Text => {
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        }
    }

    /// A whole answer of the assistant, and why it ended.
    fn message(&self, text: &str, finish: Option<&'static str>) -> (Value, Option<&'static str>) {
        let Some(format) = self.calls else {
            return (json!({"role": "assistant", "content": text}), finish);
        };
        let mut calls = Calls::new(format);
        let mut found = calls.push(text, true);
        let mut message = json!({"role": "assistant", "content": found.content()});
        if !found.calls.is_empty() {
            // Places belong to streams.
            let listed = found.calls.iter_mut().filter_map(Value::as_object_mut);
            listed.for_each(|call| drop(call.shift_remove("index")));
            message["tool_calls"] = json!(found.calls);
        }
        (message, finish.map(|reason| calls.finish_reason(reason)))
    }

    /// One token of an answer, whose calls so far are in `calls` where it may have some. `shown`: characters of the answer so far, `None` at its beginning.
    fn chunk(
        &self,
        call: &Call,
        index: usize,
        step: &Step,
        shown: Option<usize>,
        calls: Option<&mut Calls>,
    ) -> Value {
        let mut finish = step.finish.map(finish_reason);
        let echo = if shown.is_none() { self.echo(index) } else { "" };
        let offset = shown.unwrap_or_else(|| echo.chars().count());
        let logprobs = self.logprobs(call, std::slice::from_ref(step), offset);
        let choice = match self.kind {
            Kind::Chat => {
                let mut delta = json!({"content": step.text});
                if let Some(calls) = calls {
                    let found = calls.push(&step.text, step.finish.is_some());
                    delta["content"] = found.content();
                    if !found.calls.is_empty() {
                        delta["tool_calls"] = json!(found.calls);
                    }
                    finish = finish.map(|reason| calls.finish_reason(reason));
                }
                if shown.is_none() {
                    delta["role"] = json!("assistant");
                }
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Kind::Text => {
                let text = format!("{echo}{}", step.text);
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        };
        self.object(call, vec![choice], true)
    }

    /// `offset`: characters of the answer before these tokens.
    fn logprobs(&self, call: &Call, steps: &[Step], offset: usize) -> Value {
        match self.kind {
            _ if !self.logprobs => Value::Null,
            Kind::Chat => {
                let entry = |id: u32, logprob: f32| {
                    let token = call.text.token_text(id);
                    json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()})
                };
                let with_top = |token: &Token| {
                    let mut value = entry(token.id, token.logprob);
                    value["top_logprobs"] = token.top.iter().map(|t| entry(t.id, t.logprob)).collect();
                    value
                };
                let tokens = steps.iter().filter_map(|step| step.token.as_ref());
                json!({"content": tokens.map(with_top).collect::<Vec<_>>()})
            }
            Kind::Text => {
                let mut columns = Columns::default();
                let mut pieces = call.text.pieces();
                let mut end = 0;
                for token in steps.iter().flat_map(|step| &step.prompt) {
                    columns.add(call, token.id, token.logprob, &token.top, end);
                    // A token that is no text takes no room.
                    end += pieces.push(token.id).map_or(0, |piece| piece.chars().count());
                }
                let mut end = offset;
                let made = steps.iter().filter_map(|step| Some((step.token.as_ref()?, &step.text)));
                for (token, text) in made {
                    columns.add(call, token.id, Some(token.logprob), &token.top, end);
                    end += text.chars().count();
                }
                let Columns { tokens, token_logprobs, top_logprobs, text_offset } = columns;
                json!({"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs,
                    "text_offset": text_offset})
            }
        }
    }
}

/// Tokens of a completion as OpenAI lists them: by column.
#[derive(Default)]
struct Columns {
    tokens: Vec<String>,
    /// Null for the first token of a prompt, which nothing comes before.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    /// Where each token's text begins, in characters.
    text_offset: Vec<usize>,
}

impl Columns {
    fn add(&mut self, call: &Call, id: u32, logprob: Option<f32>, top: &[TokenProbability], offset: usize) {
        let text = |id| call.text.token_text(id);
        let top = || {
            let mut listed = Map::new();
            for t in top {
                // Of tokens with the same text the likeliest counts.
                listed.entry(text(t.id)).or_insert(json!(t.logprob));
            }
            Value::Object(listed)
        };
        self.tokens.push(text(id));
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(logprob.map_or(Value::Null, |_| top()));
        self.text_offset.push(offset);
    }
}

/// The answers of all generations as they come, then the usage if wanted, then the end mark.
pub fn stream(call: &Call, generations: Vec<Generation>, frame: Frame) -> Response {
    let shown = vec![None; generations.len()];
    let each = generations.into_iter().enumerate().map(|(index, generation)| {
        let steps = stream::unfold(generation, |mut generation| async move {
            let step = generation.next().await?;
            Some((step, generation))
        });
        steps.map(move |step| (index, step)).boxed()
    });
    let steps: SelectAll<_> = stream::select_all(each);
    let calls = shown.iter().map(|_| frame.calls.map(Calls::new)).collect();
    let state = Streaming { call: call.clone(), frame, steps, shown, calls, tokens: 0, ended: false };
    let lines = stream::unfold(state, |mut state| async move { Some((state.next().await?, state)) });
    sse(lines.map(|line| Ok::<_, Infallible>(SseEvent::default().data(line))))
}

struct Streaming<S> {
    call: Call,
    frame: Frame,
    steps: S,
    /// Characters of each choice so far, `None` where nothing came yet.
    shown: Vec<Option<usize>>,
    /// The calls of each choice so far, `None` where it may have none.
    calls: Vec<Option<Calls>>,
    tokens: usize,
    ended: bool,
}

impl<S: futures_util::Stream<Item = (usize, Result<Step, ApiError>)> + Unpin> Streaming<S> {
    async fn next(&mut self) -> Option<String> {
        if self.ended {
            return None;
        }
        match self.steps.next().await {
            Some((_, Err(error))) => Some(error.body(Dialect::OpenAi).to_string()),
            Some((index, Ok(step))) => {
                let shown = self.shown[index];
                let calls = self.calls[index].as_mut();
                let chunk = self.frame.chunk(&self.call, index, &step, shown, calls);
                let before = shown.unwrap_or_else(|| self.frame.echo(index).chars().count());
                self.shown[index] = Some(before + step.text.chars().count());
                self.tokens += usize::from(step.token.is_some());
                Some(chunk.to_string())
            }
            None if self.frame.include_usage => {
                self.frame.include_usage = false;
                let mut last = self.frame.object(&self.call, Vec::new(), true);
                last["usage"] = self.frame.usage(self.tokens);
                Some(last.to_string())
            }
            None => {
                self.ended = true;
                Some("[DONE]".to_owned())
            }
        }
    }
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EosToken | FinishReason::StopSequence => "stop",
    }
}
