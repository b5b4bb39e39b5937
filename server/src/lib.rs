//! The HTTP server: TGI's and OpenAI's routes over the engine. The only place that listens.
//!
//! [`serve`] answers on a listener until it is told to stop; the engine runs on a thread of its own
//! ([`gptq_runtime::engine::run`]), and [`Codec`] brings tokenizer and chat template of a model's folder.

#![forbid(unsafe_code)]

mod access;
mod body;
mod codec;
mod connections;
mod error;
mod events;
mod fields;
mod gate;
mod generation;
mod metrics;
mod openai;
mod page;
mod parameters;
mod routes;
pub mod text;
mod tgi;
mod workers;

pub use codec::Codec;
pub use events::events;
pub use gate::{Gate, OpenRoute, Origins};

use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::Method;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use gptq_runtime::engine::EngineHandle;
use gptq_runtime::generation_config::GenerationConfig;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use access::Access;
use body::Bodies;
use error::ApiError;
use generation::GenerationParams;
use metrics::Metrics;
use text::{Span, TextCodec};
use workers::Workers;

const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A text of so many tokens can be tokenized, also where prompts must be shorter.
const LEAST_TOKENIZED: usize = 65_536;
/// And of so many bytes for each: a token with its place in the text takes some 200 bytes of memory, and a text may have
/// as many as it has bytes.
const TOKENIZED_BYTES: usize = 8;

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
    /// A request's head, and then its body, must arrive within this time.
    pub read_timeout: Duration,
}

impl ServerLimits {
    /// text-generation-inference's, for sequences of up to so many tokens.
    pub fn new(max_total_tokens: usize) -> Self {
        Self {
            max_concurrent_requests: 128,
            max_best_of: 2,
            max_stop_sequences: 4,
            max_client_batch_size: 4,
            max_top_n_tokens: 5,
            max_input_tokens: max_total_tokens.saturating_sub(1),
            max_total_tokens,
            payload_limit: 2_000_000,
            read_timeout: Duration::from_secs(30),
        }
    }
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
    /// What counts where a request says nothing.
    pub defaults: GenerationConfig,
    pub vocab_size: usize,
    pub gate: Gate,
    pub text: Arc<dyn TextCodec>,
    pub engine: EngineHandle,
}

struct App {
    config: ServerConfig,
    places: Arc<Semaphore>,
    bodies: Bodies,
    workers: Arc<Workers>,
    metrics: Metrics,
    created: u64,
}

impl Deref for App {
    type Target = ServerConfig;

    fn deref(&self) -> &ServerConfig {
        &self.config
    }
}

/// A request being answered.
#[derive(Clone)]
struct Call {
    app: Arc<App>,
    access: Arc<Access>,
    /// Its place among the requests that may run at a time, held until the last task that works on the answer is
    /// done; `None` where nothing is computed.
    _place: Option<Arc<OwnedSemaphorePermit>>,
}

impl Deref for Call {
    type Target = App;

    fn deref(&self) -> &App {
        &self.app
    }
}

/// Serves until `stop` is done, then lets running answers end, for at most 88 seconds. What still works on texts then
/// goes on in the runtime's blocking threads: shut that down in the background.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (engine, read_timeout) = (config.engine.clone(), config.limits.read_timeout);
    let cors = cors(&config.gate.origins);
    let app = Arc::new(App {
        places: Arc::new(Semaphore::new(config.limits.max_concurrent_requests)),
        bodies: Bodies::new(config.limits.payload_limit, read_timeout),
        workers: Arc::default(),
        metrics: Metrics::new(&config.limits).map_err(std::io::Error::other)?,
        created: unix_time(),
        config,
    });
    let router = Router::new().fallback(routes::answer).with_state(app);
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    connections::run(listener, router, read_timeout, stop, || engine.stop()).await;
    engine.stop();
    Ok(())
}

impl App {
    fn healthy(&self) -> Result<(), ApiError> {
        if self.engine.stats.ready.load(Relaxed) { Ok(()) } else { Err(ApiError::unhealthy()) }
    }

    fn take_place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.places.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())
    }

    /// Ids of a prompt. One that is too long whatever its tokens are is refused unread.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let tokens = self.limits.max_input_tokens;
        check_length(text, tokens, self.most_bytes(tokens))?;
        self.text.encode(text, add_special).map_err(ApiError::validation)
    }

    /// Ids of a prompt of which only the last `keep` will count; what cannot be among them is not read.
    fn encode_end(&self, text: &str, add_special: bool, keep: usize) -> Result<Vec<u32>, ApiError> {
        let most = self.most_bytes(keep.min(self.limits.max_input_tokens));
        let start = text.len().saturating_sub(most);
        let start = (start..text.len()).find(|place| text.is_char_boundary(*place)).unwrap_or(text.len());
        self.text.encode(&text[start..], add_special).map_err(ApiError::validation)
    }

    /// Tokens and their places in a text that is not generated from.
    fn spans(&self, text: &str, add_special: bool) -> Result<Vec<Span>, ApiError> {
        let limit = self.limits.max_total_tokens.max(LEAST_TOKENIZED);
        check_length(text, limit, limit.saturating_mul(TOKENIZED_BYTES))?;
        let spans = self.text.spans(text, add_special).map_err(ApiError::validation)?;
        match spans.len() {
            tokens if tokens > limit => {
                Err(ApiError::validation(format!("inputs: expected at most {limit} tokens, got {tokens}")))
            }
            _ => Ok(spans),
        }
    }

    /// No text of so many tokens is longer.
    fn most_bytes(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.text.longest_token())
    }

    /// Room for new tokens after a prompt; what is not asked for is what the limits leave.
    fn new_tokens(&self, asked: Option<usize>, prompt: usize, name: &str) -> Result<usize, ApiError> {
        let (input, total) = (self.limits.max_input_tokens, self.limits.max_total_tokens);
        if prompt == 0 || prompt > input {
            return Err(ApiError::validation(format!("inputs: expected 1 to {input} tokens, got {prompt}")));
        }
        let room = total.saturating_sub(prompt);
        match asked.unwrap_or(self.defaults.max_new_tokens.map_or(room, |tokens| tokens.min(room))) {
            tokens if tokens == 0 || tokens > room => Err(ApiError::validation(format!(
                "{name}: expected 1 to {room} (max_total_tokens {total} less {prompt} tokens of input), got {tokens}"
            ))),
            tokens => Ok(tokens),
        }
    }

    /// The limits and ranges that all routes share.
    fn checked(&self, plan: GenerationParams) -> Result<GenerationParams, ApiError> {
        let vocab = self.vocab_size;
        let biased = plan.task.adjustments.logit_bias.iter().map(|(id, _)| *id);
        if let Some(id) = plan.task.prompt.iter().copied().chain(biased).find(|id| *id as usize >= vocab) {
            return Err(ApiError::validation(format!("token ids: expected less than {vocab}, got {id}")));
        }
        plan.task.sampling.check().map_err(|error| ApiError::validation(error.to_string()))?;
        plan.task.adjustments.check().map_err(|error| ApiError::validation(error.to_string()))?;
        Ok(plan)
    }
}

/// Refuses a text by its bytes alone.
fn check_length(text: &str, tokens: usize, most: usize) -> Result<(), ApiError> {
    match text.len() {
        bytes if bytes > most => Err(ApiError::validation(format!(
            "inputs: expected at most {tokens} tokens in at most {most} bytes, got {bytes} bytes"
        ))),
        _ => Ok(()),
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

/// Nothing where only the server's own page may ask: browsers then keep its answers from all others.
fn cors(origins: &Origins) -> Option<CorsLayer> {
    let layer = CorsLayer::new().allow_methods([Method::GET, Method::POST]).expose_headers(Any);
    // Mirrored, because a `*` does not cover `Authorization`.
    let layer = layer.allow_headers(tower_http::cors::AllowHeaders::mirror_request());
    match origins {
        Origins::None => None,
        Origins::Any => Some(layer.allow_origin(Any)),
        Origins::Listed(origins) => Some(layer.allow_origin(AllowOrigin::list(origins.iter().cloned()))),
    }
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
