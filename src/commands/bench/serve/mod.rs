//! `gptq bench serve`: clients that stream from a running server and look closely at what they get.

mod client;
mod report;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::http::Uri;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::args::ServeBenchArgs;
use crate::output;
use client::{Client, Outcome};
use report::Tally;

/// A client that was refused or did not get through waits this long. Shorter than a server's `retry-after`: places
/// that come free are to be taken.
const PAUSE: Duration = Duration::from_millis(100);
/// A server that cannot be reached so many times in a row is gone.
const GONE: usize = 10;
const WORDS: [&str; 24] = [
    "river", "city", "old", "stone", "winter", "light", "north", "garden", "people", "music", "road",
    "island", "king", "water", "long", "market", "year", "small", "church", "field", "war", "night",
    "school", "line",
];

pub fn run(args: &ServeBenchArgs) -> Result<()> {
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
    let server = Server::new(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(load(args, server))?;
    match args.json {
        true => output::json(&report)?,
        false => report.print(args)?,
    }
    ensure!(report.broken == 0, "{} streams were broken, the first: {}", report.broken, report.first_problem);
    Ok(())
}

/// Where to connect and what to send there.
#[derive(Clone)]
struct Server {
    /// `host:port`
    address: String,
    api_key: Option<String>,
}

impl Server {
    fn new(args: &ServeBenchArgs) -> Result<Self> {
        let uri: Uri = args.url.parse().with_context(|| format!("--url {}", args.url))?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http"));
        let host = host.with_context(|| format!("--url: expected http://HOST:PORT, got {}", args.url))?;
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Self { address, api_key: args.api_key.clone() })
    }
}

async fn load(args: &ServeBenchArgs, server: Server) -> Result<report::Report> {
    let mut first = Client::new(server.clone());
    let words = prompt(&mut first, args).await?;
    let begun = AtomicUsize::new(0);
    let start = Instant::now();
    let until = start + Duration::from_secs_f64(args.seconds);
    let clients = (0..args.clients).map(|i| {
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        rng.set_stream(u64::from(i) + 1);
        one(args, Client::new(server.clone()), rng, words, until, &begun)
    });
    let mut all = Tally::default();
    for tally in futures_util::future::join_all(clients).await {
        all.add(tally);
    }
    Ok(all.report(start.elapsed().as_secs_f64()))
}

/// How many words have the wanted number of tokens, counted by the server's own tokenizer.
async fn prompt(client: &mut Client, args: &ServeBenchArgs) -> Result<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let text = words(&mut rng, args.prompt_tokens);
    let answer = client.post("/tokenize", &json!({"inputs": text})).await?;
    let tokens = answer.as_array().map(Vec::len).filter(|n| *n > 0);
    let tokens = tokens.with_context(|| format!("/tokenize: expected a list of tokens, got {answer}"))?;
    Ok((args.prompt_tokens * args.prompt_tokens / tokens).max(1))
}

fn words(rng: &mut ChaCha8Rng, count: usize) -> String {
    let words: Vec<_> = (0..count).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect();
    words.join(" ")
}

/// One client: request after request until the time or the number of requests is up.
async fn one(
    args: &ServeBenchArgs,
    mut client: Client,
    mut rng: ChaCha8Rng,
    count: usize,
    until: Instant,
    begun: &AtomicUsize,
) -> Tally {
    let mut tally = Tally::default();
    let limit = args.requests.unwrap_or(usize::MAX);
    let mut unreachable = 0;
    while unreachable < GONE && Instant::now() < until && begun.fetch_add(1, Relaxed) < limit {
        let text = match args.same_prompt {
            true => words(&mut ChaCha8Rng::seed_from_u64(args.seed), count),
            false => words(&mut rng, count),
        };
        let leaves = rng.random_bool(args.abandon).then(|| rng.random_range(0..args.tokens));
        let outcome = client.stream(&request(&text, args.tokens), leaves).await;
        let turned_away = !matches!(outcome, Outcome::Whole(_) | Outcome::Left);
        unreachable = if matches!(outcome, Outcome::Unreachable) { unreachable + 1 } else { 0 };
        tally.count(outcome);
        if turned_away {
            tokio::time::sleep(PAUSE).await;
        }
    }
    tally
}

fn request(text: &str, tokens: usize) -> Value {
    json!({"inputs": text, "parameters": {"max_new_tokens": tokens, "details": true}})
}
