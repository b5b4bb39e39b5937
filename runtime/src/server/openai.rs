//! OpenAI's routes: chat completions and completions.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::Event as SseEvent;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, Dialect};
use super::generation::{self, Plan, Step};
use super::text::ChatMessage;
use super::tgi::OneOrMany;
use super::{Shared, sse};
use crate::generate::FinishReason;
use crate::sampling::{Adjustments, SamplingParams};

/// What both routes take.
#[derive(Deserialize)]
struct Common {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    n: Option<usize>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
struct ChatRequest {
    messages: Vec<InMessage>,
    tools: Option<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct InMessage {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    text: Option<String>,
}

#[derive(Deserialize)]
struct CompletionRequest {
    prompt: OneOrMany,
    echo: Option<bool>,
    logprobs: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Text,
}

/// What an answer is made of, besides its tokens.
#[derive(Clone)]
struct Frame {
    kind: Kind,
    id: String,
    created: u64,
    prompt_tokens: usize,
    logprobs: bool,
    echo: String,
    include_usage: bool,
}

/// POST `/v1/chat/completions`
pub async fn chat(shared: &Shared, body: &[u8]) -> Result<Response, ApiError> {
    let request: ChatRequest = super::parse(body)?;
    let prompt = render(shared, &request)?;
    let ids = shared.text.encode(&prompt, false).map_err(ApiError::validation)?;
    let top_n = request.top_logprobs.unwrap_or(0);
    let mut plan = plan(shared, &request.common, ids, top_n, None)?;
    plan.eos_token_ids.extend(shared.text.end_of_turn());
    let logprobs = request.logprobs.unwrap_or(false);
    let frame = frame(Kind::Chat, &plan, &request.common, logprobs, String::new());
    respond(shared, &plan, &request.common, frame).await
}

/// POST `/v1/completions`
pub async fn completions(shared: &Shared, body: &[u8]) -> Result<Response, ApiError> {
    let request: CompletionRequest = super::parse(body)?;
    let mut prompts = request.prompt.list();
    let (Some(prompt), true) = (prompts.pop(), prompts.is_empty()) else {
        return Err(ApiError::validation("prompt: expected one text"));
    };
    let ids = shared.text.encode(&prompt, true).map_err(ApiError::validation)?;
    let plan = plan(shared, &request.common, ids, request.logprobs.unwrap_or(0), Some(16))?;
    let echo = if request.echo == Some(true) { prompt } else { String::new() };
    let frame = frame(Kind::Text, &plan, &request.common, request.logprobs.is_some(), echo);
    respond(shared, &plan, &request.common, frame).await
}

/// POST `/chat_tokenize`
pub fn chat_tokenize(shared: &Shared, body: &[u8]) -> Result<Response, ApiError> {
    let request: ChatRequest = super::parse(body)?;
    let prompt = render(shared, &request)?;
    let spans = shared.text.spans(&prompt).map_err(ApiError::validation)?;
    Ok(Json(json!({"tokenize_response": spans, "templated_text": prompt})).into_response())
}

fn render(shared: &Shared, request: &ChatRequest) -> Result<String, ApiError> {
    if request.messages.is_empty() {
        return Err(ApiError::validation("messages: expected at least one, got none"));
    }
    let messages: Vec<_> = request
        .messages
        .iter()
        .map(|message| {
            let content = match &message.content {
                None => String::new(),
                Some(Content::Text(text)) => text.clone(),
                Some(Content::Parts(parts)) => parts.iter().filter_map(|part| part.text.as_deref()).collect(),
            };
            ChatMessage { role: message.role.clone(), content }
        })
        .collect();
    shared.text.render(&messages, request.tools.as_ref()).map_err(ApiError::validation)
}

fn plan(
    shared: &Shared,
    common: &Common,
    prompt: Vec<u32>,
    top_n: usize,
    default_tokens: Option<usize>,
) -> Result<Plan, ApiError> {
    let limit = shared.limits.max_top_n_tokens.max(20);
    if top_n > limit {
        return Err(ApiError::validation(format!("top_logprobs: expected at most {limit}, got {top_n}")));
    }
    let bias = |(id, bias): (&String, &f32)| match id.parse() {
        Ok(id) => Ok((id, *bias)),
        Err(_) => Err(ApiError::validation(format!("logit_bias: expected token ids, got {id}"))),
    };
    let logit_bias = common.logit_bias.iter().flatten().map(bias).collect::<Result<_, _>>()?;
    let asked = common.max_completion_tokens.or(common.max_tokens).or(default_tokens);
    shared.checked(Plan {
        max_new_tokens: shared.new_tokens(asked, prompt.len(), "max_tokens")?,
        prompt,
        eos_token_ids: shared.eos_token_ids.clone(),
        sampling: SamplingParams {
            temperature: common.temperature.unwrap_or(1.0),
            top_p: common.top_p.unwrap_or(1.0),
            top_k: common.top_k.unwrap_or(0),
            repetition_penalty: common.repetition_penalty.unwrap_or(1.0),
            seed: common.seed.map_or_else(super::clock_seed, |seed| seed as u64),
        },
        adjustments: Adjustments {
            frequency_penalty: common.frequency_penalty.unwrap_or(0.0),
            presence_penalty: common.presence_penalty.unwrap_or(0.0),
            logit_bias,
            ..Adjustments::default()
        },
        top_n,
        stop: common.stop.clone().map(OneOrMany::list).unwrap_or_default(),
    })
}

fn frame(kind: Kind, plan: &Plan, common: &Common, logprobs: bool, echo: String) -> Frame {
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    Frame {
        kind,
        id: format!("{prefix}-{}", super::request_id()),
        created: super::unix_time(),
        prompt_tokens: plan.prompt.len(),
        logprobs,
        echo,
        include_usage: common.stream_options.as_ref().is_some_and(|options| options.include_usage),
    }
}

async fn respond(shared: &Shared, plan: &Plan, common: &Common, frame: Frame) -> Result<Response, ApiError> {
    let n = common.n.unwrap_or(1);
    let limit = shared.limits.max_best_of;
    if n == 0 || n > limit {
        return Err(ApiError::validation(format!("n: expected 1 to {limit}, got {n}")));
    }
    let generations = generation::start(shared, plan, n)?;
    if common.stream == Some(true) {
        return Ok(stream_of(shared, generations, frame));
    }
    let (mut choices, mut tokens) = (Vec::new(), 0);
    for (index, generation) in generations.into_iter().enumerate() {
        let steps = generation.collect().await?;
        tokens += steps.len();
        let text = steps.iter().fold(frame.echo.clone(), |text, step| text + &step.text);
        let steps: Vec<_> = steps.iter().collect();
        let finish = steps.last().and_then(|step| step.token.finish).map(finish_reason);
        let logprobs = frame.logprobs(shared, &steps);
        choices.push(match frame.kind {
            Kind::Chat => json!({"index": index, "message": {"role": "assistant", "content": text},
                "logprobs": logprobs, "finish_reason": finish}),
            Kind::Text => {
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        });
    }
    let mut answer = frame.object(shared, choices, false);
    answer["usage"] = frame.usage(tokens);
    Ok(Json(answer).into_response())
}

fn stream_of(shared: &Shared, generations: Vec<generation::Generation>, frame: Frame) -> Response {
    let each = generations.into_iter().enumerate().map(|(index, generation)| {
        let steps = stream::unfold(generation, |mut generation| async move {
            let step = generation.next().await?;
            Some((step, generation))
        });
        steps.map(move |step| (index, step)).boxed()
    });
    let (shared, mut seen, mut tokens) = (shared.clone(), BTreeMap::new(), 0);
    let end_frame = frame.clone();
    let end_shared = shared.clone();
    let counter = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = counter.clone();
    let chunks = stream::select_all(each).map(move |(index, step)| match step {
        Err(error) => error.body(Dialect::OpenAi),
        Ok(step) => {
            tokens += 1;
            counter.store(tokens, std::sync::atomic::Ordering::Relaxed);
            let first = seen.insert(index, ()).is_none();
            frame.chunk(&shared, index, &step, first)
        }
    });
    let end = stream::once(async move {
        let usage = end_frame.include_usage.then(|| {
            let mut last = end_frame.object(&end_shared, Vec::new(), true);
            last["usage"] = end_frame.usage(counted.load(std::sync::atomic::Ordering::Relaxed));
            last.to_string()
        });
        stream::iter(usage.into_iter().chain(["[DONE]".to_owned()]))
    });
    let lines = chunks.map(|chunk| chunk.to_string()).chain(end.flatten());
    sse(lines.map(|line| Ok::<_, Infallible>(SseEvent::default().data(line))))
}

impl Frame {
    fn object(&self, shared: &Shared, choices: Vec<Value>, chunk: bool) -> Value {
        let object = match (self.kind, chunk) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": shared.info.model_id,
            "system_fingerprint": shared.info.version, "choices": choices})
    }

    fn usage(&self, completion: usize) -> Value {
        json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion})
    }

    fn chunk(&self, shared: &Shared, index: usize, step: &Step, first: bool) -> Value {
        let finish = step.token.finish.map(finish_reason);
        let logprobs = self.logprobs(shared, &[step]);
        let choice = match self.kind {
            Kind::Chat => {
                let mut delta = json!({"content": step.text});
                if first {
                    delta["role"] = json!("assistant");
                }
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Kind::Text => {
                let text = if first { format!("{}{}", self.echo, step.text) } else { step.text.clone() };
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        };
        self.object(shared, vec![choice], true)
    }

    fn logprobs(&self, shared: &Shared, steps: &[&Step]) -> Value {
        let text = |id| shared.text.token_text(id);
        let entry = |id: u32, logprob: f32| {
            let token = text(id);
            json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()})
        };
        if !self.logprobs {
            return Value::Null;
        }
        let with_top = |step: &&Step| {
            let mut value = entry(step.token.id, step.token.logprob);
            value["top_logprobs"] = step.token.top.iter().map(|t| entry(t.id, t.logprob)).collect();
            value
        };
        let top = |step: &&Step| -> Value {
            step.token.top.iter().map(|t| (text(t.id), json!(t.logprob))).collect()
        };
        match self.kind {
            Kind::Chat => json!({"content": steps.iter().map(with_top).collect::<Vec<_>>()}),
            Kind::Text => json!({
                "tokens": steps.iter().map(|step| text(step.token.id)).collect::<Vec<_>>(),
                "token_logprobs": steps.iter().map(|step| step.token.logprob).collect::<Vec<_>>(),
                "top_logprobs": steps.iter().map(top).collect::<Vec<_>>(), "text_offset": [],
            }),
        }
    }
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EosToken | FinishReason::StopSequence => "stop",
    }
}
