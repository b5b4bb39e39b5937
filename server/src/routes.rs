//! From a request to the function that answers it.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::access::{Access, REQUEST_ID};
use super::body::Bytes;
use super::error::{ApiError, Dialect};
use super::gate::OpenRoute;
use super::{App, Call, fields, openai, page, tgi};

const POST_ROUTES: [&str; 7] = [
    "/",
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/chat_tokenize",
    "/v1/chat/completions",
    "/v1/completions",
];

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
    call.gate.admit(method, request.uri(), request.headers())?;
    let open = open_route(path, request.headers());
    match method.as_str() {
        "GET" | "HEAD" if open.is_some() => {
            call.gate.authorize(open, request.headers())?;
            get(call, path, open)
        }
        "POST" if POST_ROUTES.contains(&path) => {
            call.gate.authorize(None, request.headers())?;
            let body = call.bodies.read(request.into_body()).await?;
            call.healthy()?;
            // Before anything is done with the body: reading a long text is work too.
            call._place = Some(Arc::new(call.take_place()?));
            post(call, path, body).await
        }
        _ if open.is_some() || POST_ROUTES.contains(&path) => {
            Err(ApiError::method(&format!("{method} {path}")))
        }
        _ => Err(ApiError::not_found(path)),
    }
}

/// The handler of a path for GET; `None` where there is nothing to read.
fn open_route(path: &str, headers: &HeaderMap) -> Option<OpenRoute> {
    Some(match path {
        "/" if wants_html(headers) => OpenRoute::Page,
        "/chat.css" | "/chat.js" => OpenRoute::Page,
        "/" | "/health" => OpenRoute::Health,
        "/docs" => OpenRoute::Docs,
        "/info" => OpenRoute::Info,
        "/v1/models" => OpenRoute::Models,
        "/metrics" => OpenRoute::Metrics,
        _ => return None,
    })
}

fn get(call: &Call, path: &str, route: Option<OpenRoute>) -> Result<Response, ApiError> {
    match route {
        Some(OpenRoute::Page) => page::file(path).ok_or_else(|| ApiError::not_found(path)),
        Some(OpenRoute::Health) => call.healthy().map(|()| ().into_response()),
        Some(OpenRoute::Docs) => {
            Ok(([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response())
        }
        Some(OpenRoute::Info) => Ok(Json(info(call)).into_response()),
        Some(OpenRoute::Models) => Ok(Json(models(call)).into_response()),
        Some(OpenRoute::Metrics) => metrics(call),
        None => Err(ApiError::not_found(path)),
    }
}

async fn post(call: &Call, route: &str, body: Bytes) -> Result<Response, ApiError> {
    match route {
        "/tokenize" => call.aside(body, tgi::tokenize).await,
        "/chat_tokenize" => call.aside(body, openai::chat_tokenize).await,
        "/v1/chat/completions" => {
            let asked = call.aside(body, openai::chat).await?;
            openai::respond(call, asked).await
        }
        "/v1/completions" => {
            let asked = call.aside(body, openai::completions).await?;
            openai::respond(call, asked).await
        }
        "/generate_stream" => {
            let asked = call.aside(body, tgi::read).await?;
            tgi::stream(call, asked)
        }
        _ => {
            let asked = call.aside(body, tgi::read).await?;
            tgi::respond(call, asked, route == "/").await
        }
    }
}

impl Call {
    /// Reads a body beside the connections, when its turn comes.
    async fn aside<T: Send + 'static>(
        &self,
        body: Bytes,
        read: fn(&Call, &[u8]) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let call = self.clone();
        self.workers.run(body.len(), move || read(&call, &body)).await
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

/// A request whose fields are known on its route.
pub fn parse<T: DeserializeOwned>(body: &[u8], route: fields::Route) -> Result<T, ApiError> {
    fields::check(body, route)?;
    serde_json::from_slice(body).map_err(|cause| ApiError::validation(format!("body: {cause}")))
}
