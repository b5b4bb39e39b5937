//! `gptq serve`: the model on this thread, the server on others.

mod access;
mod ending;
mod limits;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use gptq_kernels::Backend;
use gptq_runtime::engine::{self, Inbox};
use gptq_runtime::quant_config::QuantConfig;
use gptq_server::{Codec, ModelInfo, ServerConfig, serve};
use tokio::net::TcpListener;

use super::common::{self, Chosen, DeviceKind};
use super::sampling::GenerationDefaults;
use crate::args::ServeArgs;
use crate::output;
use ending::Stop;
pub use limits::prefill_limits;
use limits::{Limits, RequestedLimits};

pub fn run(args: &ServeArgs) -> Result<()> {
    let model = match &args.revision {
        Some(revision) if args.model_id.contains(':') => {
            bail!("--revision {revision}: expected no branch in --model-id, got {}", args.model_id)
        }
        Some(revision) => format!("{}:{revision}", args.model_id),
        None => args.model_id.clone(),
    };
    let dir = common::model_dir(&model)?;
    let config = common::model_config(&dir)?;
    check(args, &dir)?;
    let limits = Limits::new(args, &config)?;
    let (engine, inbox) = engine::handle();
    let codec = Codec::load(&dir, args.default_system.as_deref())?;
    let defaults = GenerationDefaults::read(&dir)?;
    let gate = access::gate(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let listener = runtime
        .block_on(TcpListener::bind((args.hostname.as_str(), args.port)))
        .with_context(|| format!("listening on {}:{}", args.hostname, args.port))?;
    let server = ServerConfig {
        limits: limits.server,
        info: ModelInfo {
            model_id: args.served_model_name.clone().unwrap_or_else(|| model_name(&args.model_id, &dir)),
            model_sha: commit(&dir),
            version: env!("GPTQ_VERSION").into(),
        },
        eos_token_ids: defaults.end_ids(&config, codec.tokenizer(), &[]),
        defaults: defaults.into_config(),
        vocab_size: config.vocab_size,
        gate: access::with_hosts(gate, args, listener.local_addr()?.ip())?,
        text: Arc::new(codec),
        engine,
    };
    say!("listening on http://{}", listener.local_addr()?)?;
    let stop = Stop::on_signals(&runtime)?;
    let asked = stop.asked();
    let listening = runtime.spawn(async {
        let ended = serve(listener, server, asked).await;
        ending::limit_engine(i32::from(ended.is_err()));
        ended
    });
    let run = || match common::device(args.device, &config)? {
        Chosen::Cpu(cpu) => run_engine(&cpu, DeviceKind::Cpu, args, &dir, limits.engine, inbox),
        Chosen::Gpu(gpu) => run_engine(&gpu, DeviceKind::Gpu, args, &dir, limits.engine, inbox),
    };
    // Answers that are running are told before the process ends, whatever ended the engine.
    let served = catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err(anyhow!("the engine stopped by an error in the program")));
    if let Err(error) = &served {
        tracing::error!(error = output::chain(error), "the engine ended");
        stop.now();
    }
    let ended = ending::wait(&runtime, listening, served.is_err());
    // Work on texts whose requests are gone does not keep the process.
    runtime.shutdown_background();
    served?;
    ended.context("the server")
}

/// Loads the model and runs the engine until the server ends.
fn run_engine<B: Backend>(
    device: &B,
    kind: DeviceKind,
    args: &ServeArgs,
    dir: &Path,
    requested: RequestedLimits,
    inbox: Inbox,
) -> Result<()> {
    let model = common::load_model(device, dir)?.with_kv_dtype(args.kv_cache_dtype.into());
    Ok(engine::run(&model, requested.limits(kind), inbox)?)
}

/// A hub id as it is; a folder by its name, since its path tells about this machine.
fn model_name(id: &str, dir: &Path) -> String {
    if !Path::new(id).exists() {
        return id.to_owned();
    }
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// The commit of a folder in the hub's cache, whose snapshots are named so.
fn commit(dir: &Path) -> Option<String> {
    let snapshot = dir.parent()?.file_name()? == "snapshots";
    dir.file_name().filter(|_| snapshot)?.to_str().map(str::to_owned)
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
