//! `gptq bench serve`: clients that stream from a running server and look closely at what they get; or the same
//! requests to an engine with HTTP and without.

mod compare;
mod direct;
mod http;
mod load;
mod report;

use anyhow::{Result, ensure};
use tokio::runtime::{Builder, Runtime};

use crate::args::ServeBenchArgs;
use crate::output;
use http::{Http, Server};

pub fn run(args: &ServeBenchArgs) -> Result<()> {
    check(args)?;
    if let Some(model) = &args.model {
        return compare::run(args, model);
    }
    let server = Server::new(args)?;
    let report = runtime()?.block_on(load::run(args, || Http::new(server.clone())))?;
    match args.json {
        true => output::json(&report)?,
        false => report.print(args)?,
    }
    report.check()
}

fn check(args: &ServeBenchArgs) -> Result<()> {
    ensure!((0.0..=1.0).contains(&args.abandon), "--abandon: expected 0 to 1, got {}", args.abandon);
    ensure!(
        args.seconds > 0.0 && args.seconds <= 86_400.0,
        "--seconds: expected above 0, at most 86400, got {}",
        args.seconds
    );
    ensure!(
        args.tokens > 0 && args.prompt_tokens > 0,
        "--tokens, --prompt-tokens: expected 1 or more, got 0"
    );
    ensure!(
        args.shared_prefix <= args.prompt_tokens,
        "--shared-prefix: expected at most {} (--prompt-tokens), got {}",
        args.prompt_tokens,
        args.shared_prefix
    );
    ensure!(
        args.temperature >= 0.0 && args.temperature.is_finite(),
        "--temperature: expected 0 or more, got {}",
        args.temperature
    );
    Ok(())
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}
