//! The same load straight to the engine and over HTTP, one after the other on one loaded model.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use gptq_kernels::Backend;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::engine::{self, CacheSize, EngineHandle, EngineLimits};
use gptq_runtime::generation_config::GenerationConfig;
use gptq_runtime::model::Model;
use gptq_server::text::TextCodec;
use gptq_server::{Codec, Gate, ModelInfo, ServerConfig, ServerLimits, serve};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::direct::Direct;
use super::http::{Http, Server};
use super::report::Report;
use super::{load, report, runtime};
use crate::args::ServeBenchArgs;
use crate::commands::common::{self, Chosen, DeviceKind};
use crate::commands::serve::prefill_limits;
use crate::output;

pub fn run(args: &ServeBenchArgs, model: &str) -> Result<()> {
    let dir = common::model_dir(model)?;
    let config = common::model_config(&dir)?;
    let text = Arc::new(Codec::load(&dir, None)?);
    let limits = limits(args, &config)?;
    let compare = Compare { args, dir: &dir, config: &config, text, limits };
    let comparison = match common::device(args.device, &config)? {
        Chosen::Cpu(cpu) => compare.run(&cpu, DeviceKind::Cpu)?,
        Chosen::Gpu(gpu) => compare.run(&gpu, DeviceKind::Gpu)?,
    };
    match args.json {
        true => output::json(&comparison)?,
        false => comparison.print(args, model)?,
    }
    comparison.rounds.iter().flat_map(Round::runs).try_for_each(|(_, run)| run.report.check())
}

/// Room for all clients at a time: what is measured is not the queue. A prompt of random words may be somewhat
/// longer than it was meant to be.
fn limits(args: &ServeBenchArgs, config: &ModelConfig) -> Result<EngineLimits> {
    let (prompt, context) = (args.prompt_tokens, config.context_length());
    let total = prompt.saturating_add(prompt / 4 + 16).saturating_add(args.tokens);
    ensure!(
        total <= context,
        "--prompt-tokens, --tokens: expected a quarter more and 16 to fit into {context}, got {total}"
    );
    let clients = args.clients as usize;
    Ok(EngineLimits {
        max_total_tokens: total,
        prefill: prefill_limits(DeviceKind::Cpu, None, None),
        cache: CacheSize::Tokens(clients * total.next_multiple_of(16)),
        max_running: clients,
        prefix_cache: !args.no_prefix_cache,
    })
}

#[derive(Serialize)]
struct Comparison {
    device: String,
    kv_cache_dtype: String,
    /// The median of all rounds.
    http_share: f64,
    /// By this share, the smallest first.
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct Round {
    engine: Run,
    http: Run,
    /// Tokens a second over HTTP, of the engine's own.
    http_share: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    http_without_prefix_cache: Option<Run>,
}

#[derive(Serialize)]
struct Run {
    #[serde(flatten)]
    report: Report,
    /// Prompt tokens that were found in the prefix cache.
    cached_tokens: u64,
}

impl Round {
    /// Each with its name.
    fn runs(&self) -> impl Iterator<Item = (&'static str, &Run)> {
        let without = self.http_without_prefix_cache.as_ref();
        let always = [("engine", &self.engine), ("HTTP", &self.http)];
        always.into_iter().chain(without.map(|run| ("HTTP, no prefix cache", run)))
    }
}

impl Comparison {
    fn new(device: String, kv_cache_dtype: String, mut rounds: Vec<Round>) -> Self {
        rounds.sort_by(|a, b| a.http_share.total_cmp(&b.http_share));
        let http_share = rounds.get(rounds.len() / 2).map_or(f64::NAN, |round| round.http_share);
        Self { device, kv_cache_dtype, http_share, rounds }
    }

    /// The median round, and how far the others are from it.
    fn print(&self, args: &ServeBenchArgs, model: &str) -> Result<()> {
        let (first, last) = (self.rounds.first(), self.rounds.last());
        let Some(round) = self.rounds.get(self.rounds.len() / 2) else { return Ok(()) };
        report::title(args, &format!("{model}{}, on {}", common::kv_note(args.kv_cache_dtype), self.device))?;
        report::table(round.runs().map(|(name, run)| (name, &run.report)))?;
        let cached = round.runs().map(|(name, run)| format!("{name} {}", run.cached_tokens));
        let cached = cached.collect::<Vec<_>>().join("; ");
        say!("\nprompt tokens found in the prefix cache: {cached}")?;
        let percent = |round: Option<&Round>| 100.0 * round.map_or(f64::NAN, |round| round.http_share);
        let range = match self.rounds.len() {
            1 => String::new(),
            n => format!(" (median of {n} rounds, {:.1} to {:.1})", percent(first), percent(last)),
        };
        let share = percent(Some(round));
        Ok(say!("HTTP has {share:.1} % of the engine's tokens a second{range}")?)
    }
}

/// The part that needs a device.
struct Compare<'a> {
    args: &'a ServeBenchArgs,
    dir: &'a Path,
    config: &'a ModelConfig,
    text: Arc<dyn TextCodec>,
    limits: EngineLimits,
}

/// How the requests get to the engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Straight,
    Http,
}

impl Compare<'_> {
    fn run<B: Backend>(mut self, device: &B, kind: DeviceKind) -> Result<Comparison> {
        self.limits.prefill = prefill_limits(kind, None, None);
        let kv_dtype = self.args.kv_cache_dtype;
        let model = common::load_model(device, self.dir)?.with_kv_dtype(kv_dtype.into());
        let rounds = (0..self.args.rounds).map(|number| self.round(&model, number));
        Ok(Comparison::new(device.name(), common::name(kv_dtype), rounds.collect::<Result<_>>()?))
    }

    /// Which of them goes first changes from round to round, since a machine is not the same all the time.
    fn round<B: Backend>(&self, model: &Model<B>, number: u32) -> Result<Round> {
        let straight = || self.measure(model, Way::Straight, self.limits);
        let over_http = || self.measure(model, Way::Http, self.limits);
        let (engine, http) = if number.is_multiple_of(2) {
            let engine = straight()?;
            (engine, over_http()?)
        } else {
            let http = over_http()?;
            (straight()?, http)
        };
        let uncached = EngineLimits { prefix_cache: false, ..self.limits };
        let wanted = self.limits.prefix_cache && self.args.shared_prefix > 0;
        let without = wanted.then(|| self.measure(model, Way::Http, uncached)).transpose()?;
        Ok(Round {
            http_share: http.report.tokens_per_second / engine.report.tokens_per_second,
            engine,
            http,
            http_without_prefix_cache: without,
        })
    }

    /// In an engine of its own, which knows no prompt yet; it runs on this thread, as a server's does.
    fn measure<B: Backend>(&self, model: &Model<B>, way: Way, limits: EngineLimits) -> Result<Run> {
        let (handle, inbox) = engine::handle();
        let stats = handle.stats.clone();
        let report = std::thread::scope(|scope| {
            let load = scope.spawn(|| self.load(handle, way));
            // Where it fails its inbox is gone, and the load hears that.
            engine::run(model, limits, inbox).context("the engine")?;
            load.join().map_err(|_| anyhow!("the load did not end as it should"))?
        })?;
        Ok(Run { report, cached_tokens: stats.cached_tokens.load(Relaxed) })
    }

    /// The engine ends with the last handle to it.
    fn load(&self, engine: EngineHandle, way: Way) -> Result<Report> {
        let clients = runtime()?;
        let direct = Direct {
            engine: engine.clone(),
            text: self.text.clone(),
            eos_token_ids: self.config.eos_token_ids.clone(),
        };
        clients.block_on(direct.ready())?;
        if way == Way::Straight {
            return clients.block_on(load::run(self.args, || direct.clone()));
        }
        let serving = runtime()?;
        let listener = serving.block_on(TcpListener::bind(("127.0.0.1", 0)))?;
        let server = Server { address: listener.local_addr()?.to_string(), api_key: None };
        let (stop, stopped) = oneshot::channel::<()>();
        let served = serving.spawn(serve(listener, self.server(engine), async {
            // Dropping the sender is the sign.
            let _ = stopped.await;
        }));
        let report = clients.block_on(load::run(self.args, || Http::new(server.clone())));
        drop(stop);
        serving.block_on(served)??;
        report
    }

    /// As `gptq serve` has it, with the limits of the load.
    fn server(&self, engine: EngineHandle) -> ServerConfig {
        let EngineLimits { max_total_tokens, max_running, .. } = self.limits;
        ServerConfig {
            limits: ServerLimits {
                max_concurrent_requests: max_running,
                max_best_of: 1,
                max_stop_sequences: 0,
                max_client_batch_size: 1,
                max_top_n_tokens: 0,
                max_input_tokens: max_total_tokens - 1,
                max_total_tokens,
                payload_limit: 2_000_000,
                read_timeout: Duration::from_secs(30),
            },
            info: ModelInfo {
                model_id: self.dir.display().to_string(),
                model_sha: None,
                version: env!("GPTQ_VERSION").into(),
            },
            eos_token_ids: self.config.eos_token_ids.clone(),
            // Requests say all that matters.
            defaults: GenerationConfig::default(),
            vocab_size: self.config.vocab_size,
            gate: Gate::default(),
            text: self.text.clone(),
            engine,
        }
    }
}
