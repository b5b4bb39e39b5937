//! OpenAI's routes: chat completions and completions.

mod answer;
mod request;
pub mod tool_calls;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::Call;
use super::error::ApiError;
use super::generation::{self, Plan};
use super::routes::parse;
use answer::{Frame, Kind};
use request::{ChatRequest, Common, CompletionRequest, Prompt};

/// What OpenAI generates where a completion asks for no number of tokens.
const DEFAULT_COMPLETION: usize = 16;

/// POST `/v1/chat/completions`
pub async fn chat(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(body)?;
    request.check()?;
    let prompt = request.render(call)?;
    let ids = call.encode(&prompt, false)?;
    let mut plan = request.common.plan(call, ids, request.top_logprobs.unwrap_or(0), None)?;
    plan.task.eos_token_ids.extend(call.text.end_of_turn());
    let logprobs = request.logprobs.unwrap_or(false);
    respond(call, vec![plan], &request.common, Frame::new(Kind::Chat, logprobs)).await
}

/// POST `/v1/completions`
pub async fn completions(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: CompletionRequest = parse(body)?;
    request.check()?;
    let prompts = request.prompt.list();
    let limit = call.limits.max_client_batch_size;
    if prompts.is_empty() || prompts.len() > limit {
        let got = prompts.len();
        return Err(ApiError::validation(format!("prompt: expected 1 to {limit} texts, got {got}")));
    }
    let (mut plans, mut echoes) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (ids, text) = match prompt {
            Prompt::Text(text) => (call.encode(&text, true)?, Some(text)),
            Prompt::Ids(ids) => (ids, None),
        };
        let top_n = request.logprobs.unwrap_or(0);
        let mut plan = request.common.plan(call, ids, top_n, Some(DEFAULT_COMPLETION))?;
        plan.task.prompt_logprobs = request.echo == Some(true) && request.logprobs.is_some();
        echoes.push(match (request.echo, text) {
            (Some(true), Some(text)) => text,
            (Some(true), None) => decode(call, &plan.task.prompt)?,
            _ => String::new(),
        });
        plans.push(plan);
    }
    let mut frame = Frame::new(Kind::Text, request.logprobs.is_some());
    frame.echoes = echoes;
    respond(call, plans, &request.common, frame).await
}

/// POST `/chat_tokenize`
pub fn chat_tokenize(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(body)?;
    let prompt = request.render(call)?;
    let spans = call.text.spans(&prompt, false).map_err(ApiError::validation)?;
    Ok(Json(json!({"tokenize_response": spans, "templated_text": prompt})).into_response())
}

fn decode(call: &Call, ids: &[u32]) -> Result<String, ApiError> {
    let mut pieces = call.text.pieces();
    let decoded = ids.iter().map(|id| pieces.push(*id)).collect::<Result<String, _>>();
    Ok(decoded.map_err(ApiError::validation)? + &pieces.finish().map_err(ApiError::validation)?)
}

async fn respond(
    call: &Call,
    plans: Vec<Plan>,
    common: &Common,
    mut frame: Frame,
) -> Result<Response, ApiError> {
    let (n, best_of) = common.samples(call)?;
    frame.prompt_tokens = plans.iter().map(|plan| plan.task.prompt.len()).sum();
    (frame.n, frame.include_usage) = (n, common.include_usage());
    let generations = generation::start(call, &plans, best_of)?;
    if common.stream == Some(true) {
        return Ok(answer::stream(call, generations, frame));
    }
    let mut outcomes = generation::collect(generations).await?;
    let tokens = outcomes.iter().map(Vec::len).sum();
    if best_of > n {
        let of_a_prompt = outcomes.chunks_mut(best_of);
        of_a_prompt.for_each(|all| {
            all.sort_by(|a, b| generation::likelihood(b).total_cmp(&generation::likelihood(a)));
        });
    }
    let kept = outcomes.chunks(best_of).flat_map(|all| all.iter().take(n));
    let choices = kept.enumerate().map(|(index, steps)| frame.choice(call, index, steps)).collect();
    let mut answer = frame.object(call, choices, false);
    answer["usage"] = frame.usage(tokens);
    Ok(Json(answer).into_response())
}
