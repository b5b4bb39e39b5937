//! The HTTP server: TGI's and OpenAI's routes over the engine. The only place that listens.

mod error;
mod generation;
mod metrics;
mod openai;
pub mod text;
mod tgi;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::{Json, Router};
use futures_util::Stream;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::engine::EngineHandle;
use error::{ApiError, Dialect};
use generation::Plan;
use metrics::Metrics;
use text::TextCodec;

/// A body that has not arrived by then never will.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What runs when the server is asked to stop may take this long to end.
const GRACE: Duration = Duration::from_secs(85);

/// What clients may ask for.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    pub max_concurrent_requests: usize,
    pub max_best_of: usize,
    pub max_stop_sequences: usize,
    pub max_client_batch_size: usize,
    pub max_top_n_tokens: usize,
    pub max_input_tokens: usize,
    pub max_total_tokens: usize,
    /// Bytes of a request's body.
    pub payload_limit: usize,
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub model_id: String,
    pub model_sha: Option<String>,
    pub version: String,
}

/// Everything a server needs.
pub struct ServerConfig {
    pub limits: ServerLimits,
    pub info: ModelInfo,
    /// Ids that end any text.
    pub eos_token_ids: Vec<u32>,
    pub vocab_size: usize,
    pub api_key: Option<String>,
    /// Origins of other sites' pages; none given allows every one.
    pub cors_allow_origin: Vec<HeaderValue>,
    pub text: Arc<dyn TextCodec>,
    pub engine: EngineHandle,
}

type Shared = Arc<App>;

struct App {
    config: ServerConfig,
    permits: Arc<Semaphore>,
    metrics: Metrics,
    created: u64,
}

impl std::ops::Deref for App {
    type Target = ServerConfig;

    fn deref(&self) -> &ServerConfig {
        &self.config
    }
}

/// Serves until `stop` is done, then lets running answers end, for at most 85 seconds.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let cors = cors(&config.cors_allow_origin);
    let app = Arc::new(App {
        permits: Arc::new(Semaphore::new(config.limits.max_concurrent_requests)),
        metrics: Metrics::default(),
        created: unix_time(),
        config,
    });
    let engine = app.engine.clone();
    let router = Router::new().fallback(answer).layer(cors).with_state(app);
    let (stopping, mut stopped) = tokio::sync::watch::channel(false);
    let signal = async move {
        stop.await;
        // The receiver lives as long as this function.
        let _ = stopping.send(true);
    };
    let late = async move {
        if stopped.wait_for(|stopped| *stopped).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GRACE).await;
    };
    let done = tokio::select! {
        done = axum::serve(listener, router).with_graceful_shutdown(signal) => done,
        () = late => Ok(()),
    };
    engine.stop();
    done
}

/// Every request comes through here: one id, one line in the log, one shape of errors.
async fn answer(State(app): State<Shared>, request: Request) -> Response {
    let started = Instant::now();
    let id = request_id();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let dialect = if path.starts_with("/v1") { Dialect::OpenAi } else { Dialect::Tgi };
    let mut response = match route(&app, &method, &path, request).await {
        Ok(response) => response,
        Err(error) => error.respond(dialect),
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), value);
    }
    let (status, seconds) = (response.status(), started.elapsed().as_secs_f64());
    app.metrics.count(&path, status, seconds);
    tracing::info!(request = id, %method, path, status = status.as_u16(), seconds, "answered");
    response
}

async fn route(app: &Shared, method: &Method, path: &str, request: Request) -> Result<Response, ApiError> {
    match (method.as_str(), path) {
        ("GET" | "HEAD", "/") if wants_html(request.headers()) => {
            Ok(Html(include_str!("chat.html")).into_response())
        }
        ("GET" | "HEAD", "/" | "/health") => app.healthy().map(|()| ().into_response()),
        ("GET", "/info") => Ok(Json(info(app)).into_response()),
        ("GET", "/v1/models") => Ok(Json(json!({"object": "list", "data": [
            {"id": app.info.model_id, "object": "model", "created": app.created, "owned_by": app.info.model_id}
        ]}))
        .into_response()),
        ("GET", "/metrics") => Ok(app.metrics.text(&app.engine.stats).into_response()),
        ("GET", "/docs") => {
            Ok(([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response())
        }
        ("POST", route) if POST_ROUTES.contains(&route) => {
            authorize(app.api_key.as_deref(), request.headers())?;
            let body = read_body(request.into_body(), app.limits.payload_limit).await?;
            app.healthy()?;
            match route {
                "/tokenize" => tgi::tokenize(app, &body),
                "/chat_tokenize" => openai::chat_tokenize(app, &body),
                "/v1/chat/completions" => openai::chat(app, &body).await,
                "/v1/completions" => openai::completions(app, &body).await,
                _ => tgi::generate(app, &body, route).await,
            }
        }
        (_, known) if POST_ROUTES.contains(&known) || GET_ROUTES.contains(&known) => {
            Err(ApiError::method(&format!("{method} {path}")))
        }
        _ => Err(ApiError::not_found(path)),
    }
}

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

/// The time a comparison takes says nothing about the key.
fn authorize(key: Option<&str>, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = key else { return Ok(()) };
    let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    let different = (0..key.len().max(given.len())).fold(key.len() ^ given.len(), |different, i| {
        let of = |bytes: &[u8]| usize::from(bytes.get(i).copied().unwrap_or(0));
        different | (of(key.as_bytes()) ^ of(given))
    });
    if std::hint::black_box(different) == 0 { Ok(()) } else { Err(ApiError::unauthorized()) }
}

async fn read_body(body: Body, limit: usize) -> Result<axum::body::Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, limit)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(ApiError::too_large(limit)),
        Err(_) => Err(ApiError::slow()),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|cause| ApiError::validation(format!("body: {cause}")))
}

impl App {
    fn healthy(&self) -> Result<(), ApiError> {
        if self.engine.stats.ready.load(Relaxed) { Ok(()) } else { Err(ApiError::unhealthy()) }
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.permits.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())
    }

    /// Room for new tokens after a prompt; what is not asked for is what the limits leave.
    fn new_tokens(&self, asked: Option<usize>, prompt: usize, name: &str) -> Result<usize, ApiError> {
        let (input, total) = (self.limits.max_input_tokens, self.limits.max_total_tokens);
        if prompt == 0 || prompt > input {
            return Err(ApiError::validation(format!("inputs: expected 1 to {input} tokens, got {prompt}")));
        }
        let room = total.saturating_sub(prompt);
        match asked.unwrap_or(room) {
            tokens if tokens == 0 || tokens > room => Err(ApiError::validation(format!(
                "{name}: expected 1 to {room} (max_total_tokens {total} less {prompt} tokens of input), got {tokens}"
            ))),
            tokens => Ok(tokens),
        }
    }

    /// The limits and ranges that all routes share.
    fn checked(&self, mut plan: Plan) -> Result<Plan, ApiError> {
        let limit = self.limits.max_stop_sequences;
        if plan.stop.len() > limit {
            let got = plan.stop.len();
            return Err(ApiError::validation(format!("stop: expected at most {limit} strings, got {got}")));
        }
        plan.stop.retain(|stop| !stop.is_empty());
        let vocab = self.vocab_size;
        let biased = plan.adjustments.logit_bias.iter().map(|(id, _)| *id);
        if let Some(id) = plan.prompt.iter().copied().chain(biased).find(|id| *id as usize >= vocab) {
            return Err(ApiError::validation(format!("token ids: expected less than {vocab}, got {id}")));
        }
        plan.sampling.check().map_err(|error| ApiError::validation(error.to_string()))?;
        plan.adjustments.check().map_err(|error| ApiError::validation(error.to_string()))?;
        Ok(plan)
    }
}

/// Server-sent events that no proxy holds back.
fn sse<S>(events: S) -> Response
where
    S: Stream<Item = Result<Event, std::convert::Infallible>> + Send + 'static,
{
    let body = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    ([("x-accel-buffering", "no")], body).into_response()
}

fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let layer = CorsLayer::new().allow_methods([Method::GET, Method::POST]).expose_headers(Any);
    // Mirrored, because a `*` does not cover `Authorization`.
    let layer = layer.allow_headers(tower_http::cors::AllowHeaders::mirror_request());
    match origins {
        [] => layer.allow_origin(Any),
        origins => layer.allow_origin(AllowOrigin::list(origins.iter().cloned())),
    }
}

/// Unique in this process, and unlikely to repeat in another one.
fn request_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{:x}-{:x}", clock_seed() >> 10, COUNT.fetch_add(1, Relaxed))
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
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
