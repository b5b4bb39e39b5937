//! The routes of text-generation-inference.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::Event as SseEvent;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, Dialect};
use super::generation::{self, Generation, Plan, Step};
use super::{Call, routes, sse};
use crate::engine::{PromptToken, Task};
use crate::generate::FinishReason;
use crate::sampling::{Adjustments, SamplingParams};

#[derive(Deserialize)]
pub struct GenerateRequest {
    inputs: String,
    #[serde(default)]
    parameters: Parameters,
    #[serde(default)]
    stream: bool,
}

/// A stop string, or a list of them.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn list(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize, Default)]
struct Parameters {
    best_of: Option<usize>,
    temperature: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    typical_p: Option<f32>,
    #[serde(default)]
    do_sample: Option<bool>,
    max_new_tokens: Option<usize>,
    return_full_text: Option<bool>,
    stop: Option<OneOrMany>,
    truncate: Option<usize>,
    details: Option<bool>,
    decoder_input_details: Option<bool>,
    seed: Option<u64>,
    top_n_tokens: Option<usize>,
    grammar: Option<Value>,
}

/// POST `/generate`, `/generate_stream` and `/`; the last answers in a list.
pub async fn generate(call: &Call, body: &[u8], route: &str) -> Result<Response, ApiError> {
    let request: GenerateRequest = routes::parse(body)?;
    let plan = plan(call, &request)?;
    let best_of = request.parameters.best_of.unwrap_or(1);
    let greedy = plan.task.sampling.temperature == 0.0;
    let limit = call.limits.max_best_of;
    match best_of {
        0 => return Err(ApiError::validation("best_of: expected 1 or more, got 0")),
        n if n > limit => {
            return Err(ApiError::validation(format!("best_of: expected at most {limit}, got {n}")));
        }
        n if n > 1 && greedy => {
            return Err(ApiError::validation("best_of: expected sampling, got greedy decoding"));
        }
        _ => {}
    }
    let echo = match request.parameters.return_full_text {
        Some(true) => request.inputs.clone(),
        _ => String::new(),
    };
    let seed = (!greedy).then_some(plan.task.sampling.seed);
    if route == "/generate_stream" || (route == "/" && request.stream) {
        if best_of > 1 {
            return Err(ApiError::validation("best_of: expected 1 for a stream"));
        }
        if request.parameters.decoder_input_details == Some(true) {
            return Err(ApiError::validation("decoder_input_details: expected false for a stream"));
        }
        let input_length = plan.task.prompt.len();
        let mut started = generation::start(call, &[plan], 1)?;
        let generation = started.pop().ok_or_else(ApiError::incomplete)?;
        return Ok(stream_of(call.clone(), generation, echo, seed, input_length));
    }
    let top = plan.task.top_n > 0;
    let collected = generation::collect(generation::start(call, &[plan], best_of)?).await?;
    let seeds = (0..best_of as u64).map(|i| seed.map(|seed| seed.wrapping_add(i)));
    let mut outcomes: Vec<_> = collected.into_iter().zip(seeds).collect();
    outcomes.sort_by(|a, b| generation::likelihood(&b.0).total_cmp(&generation::likelihood(&a.0)));
    let mut answers = outcomes.into_iter().map(|(steps, seed)| answer(call, &steps, &echo, seed, top));
    let (text, mut details) = answers.next().ok_or_else(ApiError::incomplete)?;
    let mut value = json!({"generated_text": text});
    if request.parameters.details == Some(true) {
        if best_of > 1 {
            details["best_of_sequences"] = answers
                .map(|(text, mut details)| {
                    details["generated_text"] = json!(text);
                    details
                })
                .collect();
        }
        value["details"] = details;
    }
    Ok(if route == "/" { Json(json!([value])) } else { Json(value) }.into_response())
}

fn answer(call: &Call, steps: &[Step], echo: &str, seed: Option<u64>, top: bool) -> (String, Value) {
    let text = steps.iter().fold(echo.to_owned(), |text, step| text + &step.text);
    let tokens: Vec<_> = steps.iter().map(|step| token(call, step)).collect();
    let mut details = json!({
        "finish_reason": steps.last().and_then(|step| step.token.finish),
        "generated_tokens": steps.len(), "seed": seed, "prefill": prefill(call, steps),
        "tokens": tokens,
    });
    if top {
        details["top_tokens"] = steps.iter().map(|step| top_tokens(call, step)).collect();
    }
    (text, details)
}

fn token(call: &Call, step: &Step) -> Value {
    let id = step.token.id;
    json!({
        "id": id, "text": step.text, "logprob": step.token.logprob,
        "special": call.text.is_special(id) || step.token.finish == Some(FinishReason::EosToken),
    })
}

/// The prompt's tokens, where they were asked for.
fn prefill(call: &Call, steps: &[Step]) -> Value {
    let of = |token: &PromptToken| json!({"id": token.id, "text": call.text.token_text(token.id), "logprob": token.logprob});
    steps.iter().flat_map(|step| &step.prompt).map(of).collect()
}

fn top_tokens(call: &Call, step: &Step) -> Value {
    let of = |t: &crate::sampling::TokenProbability| {
        let (text, special) = (call.text.token_text(t.id), call.text.is_special(t.id));
        json!({"id": t.id, "text": text, "logprob": t.logprob, "special": special})
    };
    step.token.top.iter().map(of).collect()
}

fn stream_of(
    call: Call,
    generation: Generation,
    text: String,
    seed: Option<u64>,
    input_length: usize,
) -> Response {
    let start = (generation, text, 0usize);
    let events = stream::unfold(start, move |(mut generation, mut text, count)| {
        let call = call.clone();
        async move {
            let event = match generation.next().await? {
                Err(error) => error.body(Dialect::Tgi),
                Ok(step) => {
                    text += &step.text;
                    let details = step.token.finish.map(|reason| {
                        json!({"finish_reason": reason, "generated_tokens": count + 1, "seed": seed,
                            "input_length": input_length})
                    });
                    let mut event = json!({
                        "index": count + 1, "token": token(&call, &step),
                        "generated_text": details.is_some().then_some(&text), "details": details,
                    });
                    if !step.token.top.is_empty() {
                        event["top_tokens"] = top_tokens(&call, &step);
                    }
                    event
                }
            };
            let event = SseEvent::default().data(event.to_string());
            Some((Ok::<_, Infallible>(event), (generation, text, count + 1)))
        }
    });
    sse(events)
}

fn plan(call: &Call, request: &GenerateRequest) -> Result<Plan, ApiError> {
    let p = &request.parameters;
    if p.grammar.as_ref().is_some_and(|grammar| !grammar.is_null()) {
        return Err(ApiError::validation("grammar: not supported"));
    }
    let mut prompt = call.encode(&request.inputs, true)?;
    if let Some(keep) = p.truncate {
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    let top_k = match p.top_k {
        None => 0,
        Some(k) => usize::try_from(k)
            .map_err(|_| ApiError::validation(format!("top_k: expected 0 or more, got {k}")))?,
    };
    let top_n = p.top_n_tokens.unwrap_or(0);
    let limit = call.limits.max_top_n_tokens;
    if top_n > limit {
        return Err(ApiError::validation(format!("top_n_tokens: expected at most {limit}, got {top_n}")));
    }
    let chosen = [p.temperature, p.top_p, p.typical_p].iter().any(Option::is_some) || p.top_k.is_some();
    let sample = p.do_sample.unwrap_or(false) || chosen;
    let stop = p.stop.clone().map(OneOrMany::list).unwrap_or_default();
    let task = Task {
        max_new_tokens: call.new_tokens(p.max_new_tokens, prompt.len(), "max_new_tokens")?,
        prompt,
        eos_token_ids: call.eos_token_ids.clone(),
        sampling: SamplingParams {
            temperature: if sample { p.temperature.unwrap_or(1.0) } else { 0.0 },
            top_p: p.top_p.unwrap_or(1.0),
            top_k,
            repetition_penalty: p.repetition_penalty.unwrap_or(1.0),
            seed: p.seed.unwrap_or_else(super::clock_seed),
        },
        adjustments: Adjustments {
            typical_p: p.typical_p.unwrap_or(1.0),
            frequency_penalty: p.frequency_penalty.unwrap_or(0.0),
            presence_penalty: p.presence_penalty.unwrap_or(0.0),
            logit_bias: logit_bias(p.logit_bias.as_ref())?,
        },
        top_n,
        // Where no details are wanted nobody would see them.
        prompt_logprobs: p.details == Some(true) && p.decoder_input_details == Some(true),
    };
    call.checked(Plan { task, stop })
}

/// Ids as JSON's keys, which are strings.
pub fn logit_bias(given: Option<&BTreeMap<String, f32>>) -> Result<Vec<(u32, f32)>, ApiError> {
    let parsed = |(id, bias): (&String, &f32)| match id.parse() {
        Ok(id) => Ok((id, *bias)),
        Err(_) => Err(ApiError::validation(format!("logit_bias: expected token ids, got {id}"))),
    };
    given.into_iter().flatten().map(parsed).collect()
}

/// POST `/tokenize`
pub fn tokenize(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: GenerateRequest = routes::parse(body)?;
    let spans = call.text.spans(&request.inputs, true).map_err(ApiError::validation)?;
    Ok(Json(spans).into_response())
}
