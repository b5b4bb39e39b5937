//! OpenAI's routes: chat completions and completions.

mod answer;
mod calls;
mod request;
pub mod tool_calls;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::Call;
use super::error::ApiError;
use super::fields::Route;
use super::generation::{self, GenerationParams};
use super::routes::parse;
use answer::{Frame, Kind};
use request::{ChatRequest, Common, CompletionRequest, Prompt, alternatives};
use tool_calls::ToolFormat;

/// What OpenAI generates where a completion asks for no number of tokens.
const DEFAULT_COMPLETION: usize = 16;

/// What a request wants, within the limits.
pub struct Asked {
    plans: Vec<GenerationParams>,
    common: Common,
    frame: Frame,
}

/// The body of `/v1/chat/completions`.
pub fn chat(call: &Call, body: &[u8]) -> Result<Asked, ApiError> {
    let request: ChatRequest = parse(body, Route::Chat)?;
    let prompt = request.render(call)?;
    let ids = request.common.encode(call, &prompt, false)?;
    let mut plan = request.common.plan(call, ids, (None, false), &call.text.end_of_turn())?;
    plan.task.top_n = alternatives(call, request.top_logprobs.unwrap_or(0), "top_logprobs")?;
    let mut frame = Frame::new(Kind::Chat, request.logprobs.unwrap_or(false));
    if request.tools()?.is_some() {
        frame.calls = call.text.template_source(true).and_then(ToolFormat::of_template);
        // What calls are marked with is often special.
        plan.kept = frame.calls.map_or(&[], ToolFormat::markers);
    }
    Ok(Asked { plans: vec![plan], common: request.common, frame })
}

/// The body of `/v1/completions`.
pub fn completions(call: &Call, body: &[u8]) -> Result<Asked, ApiError> {
    let request: CompletionRequest = parse(body, Route::Completions)?;
    let prompts = request.prompt.list();
    let limit = call.limits.max_client_batch_size;
    if prompts.is_empty() || prompts.len() > limit {
        let got = prompts.len();
        return Err(ApiError::validation(format!("prompt: expected 1 to {limit} texts, got {got}")));
    }
    let top_n = alternatives(call, request.logprobs.unwrap_or(0), "logprobs")?;
    let echoes = request.echo == Some(true);
    let (mut plans, mut shown) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (ids, text) = match prompt {
            Prompt::Text(text) => (request.common.encode(call, &text, true)?, Some(text)),
            Prompt::Ids(ids) => (ids, None),
        };
        let whole = ids.len();
        let mut plan = request.common.plan(call, ids, (Some(DEFAULT_COMPLETION), echoes), &[])?;
        plan.task.top_n = top_n;
        let only_echoes = plan.task.max_new_tokens == 0;
        plan.task.prompt_logprobs = echoes && (request.logprobs.is_some() || only_echoes);
        shown.push(match text {
            _ if !echoes => String::new(),
            Some(text) if plan.task.prompt.len() == whole && !request.common.truncates() => text,
            _ => decode(call, &plan.task.prompt)?,
        });
        plans.push(plan);
    }
    let mut frame = Frame::new(Kind::Text, request.logprobs.is_some());
    frame.echoes = shown;
    Ok(Asked { plans, common: request.common, frame })
}

/// POST `/chat_tokenize`
pub fn chat_tokenize(call: &Call, body: &[u8]) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(body, Route::Chat)?;
    let prompt = request.render(call)?;
    let spans = call.spans(&prompt, request.common.add_special_tokens.unwrap_or(false))?;
    Ok(Json(json!({"tokenize_response": spans, "templated_text": prompt})).into_response())
}

fn decode(call: &Call, ids: &[u32]) -> Result<String, ApiError> {
    let mut pieces = call.text.pieces();
    let decoded = ids.iter().map(|id| pieces.push(*id)).collect::<Result<String, _>>();
    Ok(decoded.map_err(ApiError::validation)? + &pieces.finish().map_err(ApiError::validation)?)
}

/// Answers what was asked, in a stream or whole.
pub async fn respond(call: &Call, asked: Asked) -> Result<Response, ApiError> {
    let Asked { mut plans, common, mut frame } = asked;
    let (n, best_of) = common.samples(call)?;
    // Which answers are the best is found by them too.
    plans.iter_mut().for_each(|plan| plan.task.logprobs = frame.logprobs || best_of > n);
    frame.prompt_tokens = plans.iter().map(|plan| plan.task.prompt.len()).sum();
    (frame.n, frame.include_usage) = (n, common.include_usage());
    let generations = generation::start(call, &plans, best_of)?;
    if common.stream == Some(true) {
        return Ok(answer::stream(call, generations, frame));
    }
    let mut outcomes = generation::collect(generations).await?;
    let tokens = outcomes.iter().flatten().filter(|step| step.token.is_some()).count();
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
