//! The load: request after request from many clients at a time, the same ones whichever way they go.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::report::{Report, Tally};
use crate::args::ServeBenchArgs;

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

/// One request; equal numbers make equal requests, from any client.
pub struct Ask {
    pub text: String,
    pub tokens: usize,
    pub temperature: f32,
    pub seed: u64,
    /// The number of tokens after which the client goes away.
    pub leaves: Option<usize>,
}

/// How a request went.
pub enum Outcome {
    Whole(Times),
    /// Another status than 200.
    Status(u16),
    /// No answer began: nothing was promised.
    Unreachable,
    /// An answer began and was not what it should be.
    Broken(String),
    /// The client went away in the middle, as it was told to.
    Left,
}

/// Seconds of one stream.
#[derive(Default)]
pub struct Times {
    pub first_token: f64,
    /// From each token to the next one.
    pub between: Vec<f64>,
}

/// One client, and its way to the model.
pub trait Client {
    /// The length of a text in tokens.
    fn length(&mut self, text: &str) -> impl Future<Output = Result<usize>>;

    /// Takes an answer to its end.
    fn stream(&mut self, ask: &Ask) -> impl Future<Output = Outcome>;
}

/// Lets clients ask until the time or the number of requests is up.
pub async fn run<C: Client>(args: &ServeBenchArgs, client: impl Fn() -> C) -> Result<Report> {
    let asks = Asks::new(args, &mut client()).await?;
    let start = Instant::now();
    let until = start + Duration::from_secs_f64(args.seconds);
    let clients = (0..args.clients).map(|_| one(client(), &asks, until));
    let mut all = Tally::default();
    for tally in futures_util::future::join_all(clients).await {
        all.add(tally);
    }
    Ok(all.report(start.elapsed().as_secs_f64()))
}

async fn one(mut client: impl Client, asks: &Asks<'_>, until: Instant) -> Tally {
    let mut tally = Tally::default();
    let mut unreachable = 0;
    while unreachable < GONE && Instant::now() < until {
        let Some(ask) = asks.next() else { break };
        let outcome = client.stream(&ask).await;
        let turned_away = !matches!(outcome, Outcome::Whole(_) | Outcome::Left);
        unreachable = if matches!(outcome, Outcome::Unreachable) { unreachable + 1 } else { 0 };
        tally.count(outcome);
        if turned_away {
            tokio::time::sleep(PAUSE).await;
        }
    }
    tally
}

/// All requests, in their order.
struct Asks<'a> {
    args: &'a ServeBenchArgs,
    begun: AtomicUsize,
    /// What every prompt begins with, and the words that follow.
    shared: String,
    own: usize,
}

impl<'a> Asks<'a> {
    /// How many words have the wanted number of tokens is seen from the model's own tokenizer.
    async fn new(args: &'a ServeBenchArgs, client: &mut impl Client) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        let tokens = client.length(&words(&mut rng, args.prompt_tokens)).await?.max(1);
        let count = |wanted: usize| wanted * args.prompt_tokens / tokens;
        let shared = words(&mut rng, count(args.shared_prefix));
        let own = count(args.prompt_tokens - args.shared_prefix);
        // No prompt is empty.
        let own = if shared.is_empty() { own.max(1) } else { own };
        Ok(Self { args, begun: AtomicUsize::new(0), shared, own })
    }

    fn next(&self) -> Option<Ask> {
        let number = self.begun.fetch_add(1, Relaxed);
        if number >= self.args.requests.unwrap_or(usize::MAX) {
            return None;
        }
        let ServeBenchArgs { tokens, temperature, abandon, seed, .. } = *self.args;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number as u64 + 1);
        let own = words(&mut rng, self.own);
        let text = format!("{} {own}", self.shared).trim().to_owned();
        let leaves = rng.random_bool(abandon).then(|| rng.random_range(0..tokens));
        Some(Ask { text, tokens, temperature, seed: seed.wrapping_add(number as u64), leaves })
    }
}

fn words(rng: &mut ChaCha8Rng, count: usize) -> String {
    let words: Vec<_> = (0..count).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect();
    words.join(" ")
}
