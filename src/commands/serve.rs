//! `gptq serve`: the model on this thread, the server on others.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::http::HeaderValue;
use gptq_kernels::{Backend, KvDtype};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::engine::{self, EngineLimits, Inbox};
use gptq_runtime::quant_config::QuantConfig;
use gptq_runtime::server::{self, ModelInfo, ServerConfig, ServerLimits};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use super::codec::Codec;
use super::common::{self, DeviceKind, OnDevice};
use super::eval;
use super::wishes::Wishes;
use crate::args::ServeArgs;
use crate::output;

pub fn run(args: &ServeArgs) -> Result<()> {
    let model = match &args.revision {
        Some(revision) if args.model_id.contains(':') => {
            bail!("--revision {revision}: expected no branch in --model-id, got {}", args.model_id)
        }
        Some(revision) => format!("{}:{revision}", args.model_id),
        None => args.model_id.clone(),
    };
    let dir = common::model_dir(&model)?;
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    check(args, &dir)?;
    let limits = Limits::new(args, &config)?;
    let (engine, inbox) = engine::handle();
    let codec = Codec::load(&dir, args.default_system.as_deref())?;
    let wishes = Wishes::read(&dir)?;
    let server = ServerConfig {
        limits: limits.server,
        info: ModelInfo {
            model_id: args.model_id.clone(),
            model_sha: commit(&dir),
            version: env!("GPTQ_VERSION").into(),
        },
        eos_token_ids: wishes.end_ids(&config, codec.tokenizer(), &[]),
        defaults: wishes.into_config(),
        vocab_size: config.vocab_size,
        api_key: api_key(args)?,
        cors_allow_origin: origins(&args.cors_allow_origin)?,
        text: Arc::new(codec),
        engine,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let listening = listen(&runtime, (&args.hostname, args.port), server)?;
    let serve = Serve { dir: &dir, kv_dtype: args.kv_cache_dtype.into(), limits: limits.engine, inbox };
    common::on_device(args.device, &config, serve)?;
    runtime.block_on(listening)?.context("the server")
}

/// The part that needs a device: loads the model and runs the engine until the server ends.
struct Serve<'a> {
    dir: &'a Path,
    kv_dtype: KvDtype,
    limits: EngineLimits,
    inbox: Inbox,
}

impl OnDevice for Serve<'_> {
    type Output = ();

    fn run<B: Backend>(self, device: B, _kind: DeviceKind) -> Result<()> {
        let model = eval::load(&device, self.dir)?.with_kv_dtype(self.kv_dtype);
        Ok(engine::run(&model, self.limits, self.inbox)?)
    }
}

fn listen(
    runtime: &Runtime,
    (host, port): (&str, u16),
    config: ServerConfig,
) -> Result<tokio::task::JoinHandle<std::io::Result<()>>> {
    let _context = runtime.enter();
    let listener = runtime
        .block_on(TcpListener::bind((host, port)))
        .with_context(|| format!("listening on {host}:{port}"))?;
    output::line(format_args!("listening on http://{}", listener.local_addr()?))?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    Ok(runtime.spawn(server::serve(listener, config, stop)))
}

/// The commit of a folder in the hub's cache, whose snapshots are named so.
fn commit(dir: &Path) -> Option<String> {
    let snapshot = dir.parent()?.file_name()? == "snapshots";
    dir.file_name().filter(|_| snapshot)?.to_str().map(str::to_owned)
}

/// The key that clients must send. An empty one, as an unset variable of a script leaves it, would open the server to all.
fn api_key(args: &ServeArgs) -> Result<Option<String>> {
    let (key, from) = match (&args.api_key, &args.api_key_file) {
        (Some(key), _) => (key.clone(), "--api-key (or API_KEY)".to_string()),
        (None, Some(path)) => {
            let text =
                fs::read_to_string(path).with_context(|| format!("--api-key-file {}", path.display()))?;
            (text.lines().next().unwrap_or_default().to_owned(), format!("--api-key-file {}", path.display()))
        }
        (None, None) => return Ok(None),
    };
    ensure!(!key.trim().is_empty(), "{from}: expected a key, got an empty one");
    Ok(Some(key))
}

/// What the launcher's flags say of the model must be true.
fn check(args: &ServeArgs, dir: &Path) -> Result<()> {
    if args.quantize.is_some() {
        ensure!(
            QuantConfig::read(dir)?.is_some(),
            "--quantize gptq: expected a GPTQ model, got {}",
            dir.display()
        );
    }
    Ok(())
}

struct Limits {
    server: ServerLimits,
    engine: EngineLimits,
}

impl Limits {
    fn new(args: &ServeArgs, config: &ModelConfig) -> Result<Self> {
        let context = config.context_length();
        let by_length = config.rope_scaling.longest_unscaled(config.max_position_embeddings).is_some();
        let total = args.max_total_tokens.unwrap_or(context.min(4096));
        ensure!((2..=context).contains(&total), "--max-total-tokens: expected 2 to {context}, got {total}");
        let input = args.max_input_tokens.or(args.max_input_length).unwrap_or(total - 1);
        ensure!((1..total).contains(&input), "--max-input-tokens: expected 1 to {}, got {input}", total - 1);
        let cached = args.max_batch_total_tokens.unwrap_or(4 * total.next_multiple_of(16));
        ensure!(
            cached >= total.next_multiple_of(16),
            "--max-batch-total-tokens: expected at least {}, got {cached}",
            total.next_multiple_of(16)
        );
        ensure!(args.max_concurrent_requests > 0, "--max-concurrent-requests: expected 1 or more, got 0");
        ensure!(args.max_client_batch_size > 0, "--max-client-batch-size: expected 1 or more, got 0");
        ensure!(args.max_batch_prefill_tokens > 0, "--max-batch-prefill-tokens: expected 1 or more, got 0");
        Ok(Self {
            server: ServerLimits {
                max_concurrent_requests: args.max_concurrent_requests.min(1 << 20),
                max_best_of: args.max_best_of,
                max_stop_sequences: args.max_stop_sequences,
                max_client_batch_size: args.max_client_batch_size,
                max_top_n_tokens: args.max_top_n_tokens,
                max_input_tokens: input,
                max_total_tokens: total,
                payload_limit: args.payload_limit,
                read_timeout: Duration::from_secs(args.read_timeout),
            },
            engine: EngineLimits {
                max_total_tokens: total,
                max_batch_prefill_tokens: args.max_batch_prefill_tokens,
                max_batch_total_tokens: cached,
                max_running: args.max_concurrent_requests,
                // Where frequencies depend on a sequence's length, another one's keys do not fit.
                prefix_cache: !args.no_prefix_cache && !by_length,
            },
        })
    }
}

fn origins(origins: &[String]) -> Result<Vec<HeaderValue>> {
    let parse = |origin: &String| {
        HeaderValue::from_str(origin)
            .with_context(|| format!("--cors-allow-origin: expected a URL, got {origin}"))
    };
    origins.iter().filter(|origin| *origin != "*").map(parse).collect()
}
