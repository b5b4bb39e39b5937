//! From a request to the function that answers it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::response::{Html, IntoResponse, Response};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::access::{Access, REQUEST_ID};
use super::error::{ApiError, Dialect};
use super::{App, Call, beside, fields, openai, tgi};

/// A body above the limit is read on up to here, so that its sender hears the refusal.
const LARGEST_REFUSED: usize = 64 << 20;

const POST_ROUTES: [&str; 7] = [
    "/",
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/chat_tokenize",
    "/v1/chat/completions",
    "/v1/completions",
];
const GET_ROUTES: [&str; 5] = ["/health", "/info", "/v1/models", "/metrics", "/docs"];

/// Every request comes through here: one id, one line in the log, one shape of errors.
pub async fn answer(State(app): State<Arc<App>>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let access = Arc::new(Access::new(method.clone(), path.clone(), request.headers()));
    let mut call = Call { app, access, _place: None };
    let dialect = if path.starts_with("/v1") { Dialect::OpenAi } else { Dialect::Tgi };
    let mut response = match route(&mut call, &method, &path, request).await {
        Ok(response) => response,
        Err(error) => {
            if error.is_refusal() {
                call.metrics.failed(error.kind);
            }
            error.respond(dialect)
        }
    };
    response.headers_mut().insert(REQUEST_ID, call.access.id.clone());
    call.access.answered(response.status());
    call.metrics.http(&path, response.status());
    response
}

async fn route(call: &mut Call, method: &Method, path: &str, request: Request) -> Result<Response, ApiError> {
    match (method.as_str(), path) {
        ("GET" | "HEAD", "/") if wants_html(request.headers()) => {
            Ok(Html(include_str!("chat.html")).into_response())
        }
        ("GET" | "HEAD", "/" | "/health") => call.healthy().map(|()| ().into_response()),
        ("GET", "/info") => Ok(Json(info(call)).into_response()),
        ("GET", "/v1/models") => Ok(Json(models(call)).into_response()),
        ("GET", "/metrics") => metrics(call),
        ("GET", "/docs") => {
            Ok(([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response())
        }
        ("POST", route) if POST_ROUTES.contains(&route) => {
            authorize(call.api_key.as_deref(), request.headers())?;
            let limits = &call.limits;
            let body = read_body(request.into_body(), limits.payload_limit, limits.read_timeout).await?;
            call.healthy()?;
            // Before anything is done with the body: reading a long text is work too.
            call._place = Some(Arc::new(call.take_place()?));
            match route {
                "/tokenize" => beside(body.len(), || tgi::tokenize(call, &body)),
                "/chat_tokenize" => beside(body.len(), || openai::chat_tokenize(call, &body)),
                "/v1/chat/completions" => openai::chat(call, &body).await,
                "/v1/completions" => openai::completions(call, &body).await,
                _ => tgi::generate(call, &body, route).await,
            }
        }
        (_, known) if POST_ROUTES.contains(&known) || GET_ROUTES.contains(&known) => {
            Err(ApiError::method(&format!("{method} {path}")))
        }
        _ => Err(ApiError::not_found(path)),
    }
}

fn wants_html(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/html"))
}

fn info(app: &App) -> serde_json::Value {
    let (info, limits) = (&app.info, &app.limits);
    json!({
        "model_id": info.model_id, "model_sha": info.model_sha, "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": limits.max_concurrent_requests, "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences, "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens, "max_client_batch_size": limits.max_client_batch_size,
        "router": "gptq", "version": info.version, "sha": null,
    })
}

fn models(app: &App) -> serde_json::Value {
    let id = &app.info.model_id;
    json!({"object": "list", "data": [{"id": id, "object": "model", "created": app.created, "owned_by": id}]})
}

fn metrics(app: &App) -> Result<Response, ApiError> {
    let text = app.metrics.text(&app.engine.stats).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// The time a comparison takes says nothing about the key.
fn authorize(key: Option<&str>, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = key else { return Ok(()) };
    let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let Some(given) = given.and_then(|given| given.strip_prefix(b"Bearer ")) else {
        return Err(ApiError::unauthorized());
    };
    let different = (0..key.len().max(given.len())).fold(key.len() ^ given.len(), |different, i| {
        let of = |bytes: &[u8]| usize::from(bytes.get(i).copied().unwrap_or(0));
        different | (of(key.as_bytes()) ^ of(given))
    });
    if std::hint::black_box(different) == 0 { Ok(()) } else { Err(ApiError::unauthorized()) }
}

async fn read_body(body: Body, limit: usize, timeout: Duration) -> Result<Vec<u8>, ApiError> {
    let read = async {
        let (mut stream, mut bytes, mut length) = (body.into_data_stream(), Vec::new(), 0usize);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|cause| ApiError::validation(format!("body: {cause}")))?;
            length = length.saturating_add(piece.len());
            if length <= limit {
                bytes.extend_from_slice(&piece);
            } else if length > LARGEST_REFUSED {
                break;
            }
        }
        if length <= limit { Ok(bytes) } else { Err(ApiError::too_large(limit)) }
    };
    tokio::time::timeout(timeout, read).await.unwrap_or_else(|_| Err(ApiError::slow()))
}

/// A request whose fields are known on its route.
pub fn parse<T: DeserializeOwned>(body: &[u8], route: fields::Route) -> Result<T, ApiError> {
    fields::check(body, route)?;
    serde_json::from_slice(body).map_err(|cause| ApiError::validation(format!("body: {cause}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_opens() {
        let open = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            authorize(Some("secret"), &headers).is_ok()
        };
        assert!(open("Bearer secret"));
        assert!(!open("Bearer secre") && !open("Bearer secrets") && !open("secret") && !open("Bearer "));
        assert!(authorize(Some("secret"), &HeaderMap::new()).is_err());
        assert!(authorize(None, &HeaderMap::new()).is_ok());
    }
}
