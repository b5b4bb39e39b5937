//! The routes of text-generation-inference.

use std::convert::Infallible;

use axum::Json;
use axum::response::sse::Event as SseEvent;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use gptq_runtime::engine::{PromptToken, Token};
use gptq_runtime::generate::FinishReason;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, Dialect};
use super::fields::Route;
use super::generation::{self, Generation, GenerationParams, Step};
use super::{Call, parameters, routes, sse};

#[derive(Deserialize)]
pub struct GenerateRequest {
    inputs: String,
    #[serde(default, deserialize_with = "or_default")]
    parameters: Parameters,
    stream: Option<bool>,
    add_special_tokens: Option<bool>,
}

/// Null counts as nothing.
fn or_default<'a, D: serde::Deserializer<'a>>(deserializer: D) -> Result<Parameters, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// TGI's own parameters, and those that both dialects have.
#[derive(Deserialize, Default)]
struct Parameters {
    do_sample: Option<bool>,
    max_new_tokens: Option<usize>,
    return_full_text: Option<bool>,
    truncate: Option<usize>,
    details: Option<bool>,
    decoder_input_details: Option<bool>,
    top_n_tokens: Option<usize>,
    #[serde(flatten)]
    common: parameters::Parameters,
}

/// What a request wants, within the limits.
pub struct Asked {
    plan: GenerationParams,
    best_of: usize,
    /// What the text begins with.
    echo: String,
    seed: Option<u64>,
    stream: bool,
    details: bool,
    /// The prompt's tokens are to be reported.
    prefill: bool,
}

/// The body of `/generate`, `/generate_stream` and `/`.
pub fn read(call: &Call, body: &[u8]) -> Result<Asked, ApiError> {
    let request: GenerateRequest = routes::parse(body, Route::Tgi)?;
    let plan = plan(call, &request)?;
    let greedy = plan.task.sampling.temperature == 0.0;
    let best_of = request.parameters.common.best_of.unwrap_or(1);
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
    Ok(Asked {
        seed: (!greedy).then_some(plan.task.sampling.seed),
        plan,
        best_of,
        stream: request.stream == Some(true),
        details: request.parameters.details == Some(true),
        prefill: request.parameters.decoder_input_details == Some(true),
        echo: match request.parameters.return_full_text {
            Some(true) => request.inputs,
            _ => String::new(),
        },
    })
}

/// POST `/generate_stream`
pub fn stream(call: &Call, asked: Asked) -> Result<Response, ApiError> {
    if asked.best_of > 1 {
        return Err(ApiError::validation("best_of: expected 1 for a stream"));
    }
    if asked.prefill {
        return Err(ApiError::validation("decoder_input_details: expected false for a stream"));
    }
    let input_length = asked.plan.task.prompt.len();
    let mut started = generation::start(call, &[asked.plan], 1)?;
    let generation = started.pop().ok_or_else(ApiError::incomplete)?;
    Ok(stream_of(call.clone(), generation, asked.echo, asked.seed, input_length))
}

/// POST `/generate` and `/`, where a stream can be asked for and other answers come in a list (`root`).
pub async fn respond(call: &Call, asked: Asked, root: bool) -> Result<Response, ApiError> {
    if root && asked.stream {
        return stream(call, asked);
    }
    let Asked { mut plan, best_of, echo, seed, details: detailed, .. } = asked;
    // Which answer is the best is found by them too.
    plan.task.logprobs = detailed || best_of > 1;
    let top = plan.task.top_n > 0;
    let collected = generation::collect(generation::start(call, &[plan], best_of)?).await?;
    let seeds = (0..best_of as u64).map(|i| seed.map(|seed| seed.wrapping_add(i)));
    let mut outcomes: Vec<_> = collected.into_iter().zip(seeds).collect();
    outcomes.sort_by(|a, b| generation::likelihood(&b.0).total_cmp(&generation::likelihood(&a.0)));
    let mut answers = outcomes.into_iter().map(|(steps, seed)| answer(call, &steps, &echo, seed, top));
    let (text, mut details) = answers.next().ok_or_else(ApiError::incomplete)?;
    let mut value = json!({"generated_text": text});
    if detailed {
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
    Ok(if root { Json(json!([value])) } else { Json(value) }.into_response())
}

fn answer(call: &Call, steps: &[Step], echo: &str, seed: Option<u64>, top: bool) -> (String, Value) {
    let text = steps.iter().fold(echo.to_owned(), |text, step| text + &step.text);
    let tokens: Vec<_> = steps.iter().filter_map(|step| token(call, step)).collect();
    let mut details = json!({
        "finish_reason": steps.last().and_then(|step| step.finish),
        "generated_tokens": steps.len(), "seed": seed, "prefill": prefill(call, steps),
        "tokens": tokens,
    });
    if top {
        details["top_tokens"] = steps.iter().map(|step| top_tokens(call, step)).collect();
    }
    (text, details)
}

/// `None` where there is no token.
fn token(call: &Call, step: &Step) -> Option<Value> {
    let Token { id, logprob, finish, .. } = step.token.as_ref()?;
    let special = call.text.is_special(*id) || *finish == Some(FinishReason::EosToken);
    Some(json!({"id": id, "text": step.text, "logprob": logprob, "special": special}))
}

/// The prompt's tokens, where they were asked for.
fn prefill(call: &Call, steps: &[Step]) -> Value {
    let of = |token: &PromptToken| json!({"id": token.id, "text": call.text.token_text(token.id), "logprob": token.logprob});
    steps.iter().flat_map(|step| &step.prompt).map(of).collect()
}

fn top_tokens(call: &Call, step: &Step) -> Value {
    let of = |t: &gptq_runtime::sampling::TokenProbability| {
        let (text, special) = (call.text.token_text(t.id), call.text.is_special(t.id));
        json!({"id": t.id, "text": text, "logprob": t.logprob, "special": special})
    };
    step.token.iter().flat_map(|token| &token.top).map(of).collect()
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
                    let details = step.finish.map(|reason| {
                        json!({"finish_reason": reason, "generated_tokens": count + 1, "seed": seed,
                            "input_length": input_length})
                    });
                    let mut event = json!({
                        "index": count + 1, "token": token(&call, &step),
                        "generated_text": details.is_some().then_some(&text), "details": details,
                    });
                    if step.token.as_ref().is_some_and(|token| !token.top.is_empty()) {
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

fn plan(call: &Call, request: &GenerateRequest) -> Result<GenerationParams, ApiError> {
    let p = &request.parameters;
    let add_special = request.add_special_tokens.unwrap_or(true);
    let prompt = match p.truncate {
        Some(keep) => {
            let mut prompt = call.encode_end(&request.inputs, add_special, keep)?;
            prompt.drain(..prompt.len().saturating_sub(keep));
            prompt
        }
        None => call.encode(&request.inputs, add_special)?,
    };
    let top_n = p.top_n_tokens.unwrap_or(0);
    let limit = call.limits.max_top_n_tokens;
    if top_n > limit {
        return Err(ApiError::validation(format!("top_n_tokens: expected at most {limit}, got {top_n}")));
    }
    let max_new_tokens = call.new_tokens(p.max_new_tokens, prompt.len(), "max_new_tokens")?;
    let mut plan = p.common.plan(call, prompt, max_new_tokens, p.temperature(call), &[])?;
    plan.task.top_n = top_n;
    // Log-probabilities of the prompt appear in the details alone.
    plan.task.prompt_logprobs = p.details == Some(true) && p.decoder_input_details == Some(true);
    Ok(plan)
}

impl Parameters {
    /// Greedy, unless the request asks for drawing, or the model's generation_config.json where the request is silent.
    fn temperature(&self, call: &Call) -> f32 {
        let draws = match self.do_sample {
            _ if self.common.draw() => true,
            Some(draws) => draws,
            None => call.defaults.draws(),
        };
        let temperature = self.common.temperature.or(call.defaults.temperature);
        if draws { temperature.unwrap_or(1.0) } else { 0.0 }
    }
}

/// POST `/tokenize`
pub fn tokenize(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: GenerateRequest = routes::parse(body, Route::Tgi)?;
    let spans = call.spans(&request.inputs, request.add_special_tokens.unwrap_or(true))?;
    Ok(Json(spans).into_response())
}
