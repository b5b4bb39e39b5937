//! What all clients saw together.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::load::{Outcome, Times};
use crate::args::ServeBenchArgs;

/// Too many requests at a time.
const REFUSED: u16 = 429;

#[derive(Default)]
pub struct Tally {
    times: Vec<Times>,
    statuses: BTreeMap<u16, usize>,
    unreachable: usize,
    left: usize,
    broken: Vec<String>,
}

#[derive(Serialize)]
pub struct Report {
    seconds: f64,
    /// Streams that were whole.
    whole: usize,
    tokens: usize,
    requests_per_second: f64,
    pub tokens_per_second: f64,
    /// Absent where no stream was whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_token_seconds: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    between_tokens_seconds: Option<Percentiles>,
    /// Left by the client on purpose.
    abandoned: usize,
    /// Status 429.
    refused: usize,
    /// Other statuses than 200 and 429.
    errors: BTreeMap<u16, usize>,
    /// No answer began.
    unreachable: usize,
    broken: usize,
    #[serde(skip_serializing_if = "String::is_empty")]
    first_problem: String,
}

#[derive(Clone, Copy, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

impl Percentiles {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        // The smallest value that the share of all values does not exceed.
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.saturating_sub(1)).copied()
        };
        Some(Self { p50: at(0.5)?, p95: at(0.95)?, p99: at(0.99)? })
    }

    fn milliseconds(self) -> [f64; 3] {
        [self.p50, self.p95, self.p99].map(|seconds| 1e3 * seconds)
    }
}

impl Tally {
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Whole(times) => self.times.push(times),
            Outcome::Status(status) => *self.statuses.entry(status).or_default() += 1,
            Outcome::Unreachable => self.unreachable += 1,
            Outcome::Broken(problem) => self.broken.push(problem),
            Outcome::Left => self.left += 1,
        }
    }

    pub fn add(&mut self, other: Self) {
        self.times.extend(other.times);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.unreachable += other.unreachable;
        self.left += other.left;
        self.broken.extend(other.broken);
    }

    pub fn report(mut self, seconds: f64) -> Report {
        let whole = self.times.len();
        let first = self.times.iter().map(|times| times.first_token).collect();
        let between: Vec<_> = self.times.iter().flat_map(|times| times.between.iter().copied()).collect();
        let tokens = whole + between.len();
        Report {
            seconds,
            whole,
            tokens,
            requests_per_second: whole as f64 / seconds,
            tokens_per_second: tokens as f64 / seconds,
            first_token_seconds: Percentiles::of(first),
            between_tokens_seconds: Percentiles::of(between),
            abandoned: self.left,
            refused: self.statuses.remove(&REFUSED).unwrap_or(0),
            errors: self.statuses,
            unreachable: self.unreachable,
            broken: self.broken.len(),
            first_problem: self.broken.into_iter().next().unwrap_or_default(),
        }
    }
}

impl Report {
    /// An error where a stream that had begun did not end as it should.
    pub fn check(&self) -> Result<()> {
        ensure!(self.broken == 0, "{} streams were broken, the first: {}", self.broken, self.first_problem);
        Ok(())
    }

    pub fn print(&self, args: &ServeBenchArgs) -> Result<()> {
        title(args, &args.url)?;
        let line = |what: &str, value: String| say!("{what:<26} {value}");
        line("seconds", format!("{:>9.1}", self.seconds))?;
        line("whole streams", format!("{:>9}   {:.1} a second", self.whole, self.requests_per_second))?;
        line("tokens", format!("{:>9}   {:.1} a second", self.tokens, self.tokens_per_second))?;
        let latencies = [
            ("first token, ms", self.first_token_seconds),
            ("between tokens, ms", self.between_tokens_seconds),
        ];
        for (what, percentiles) in latencies {
            if let Some(percentiles) = percentiles {
                let [p50, p95, p99] = percentiles.milliseconds();
                line(what, format!("{p50:>9.1} p50 {p95:>9.1} p95 {p99:>9.1} p99"))?;
            }
        }
        line("left on purpose", format!("{:>9}", self.abandoned))?;
        line("refused (429)", format!("{:>9}", self.refused))?;
        for (status, count) in &self.errors {
            line(&format!("status {status}"), format!("{count:>9}"))?;
        }
        line("unreachable", format!("{:>9}", self.unreachable))?;
        Ok(line("broken streams", format!("{:>9}", self.broken))?)
    }
}

/// What was loaded, and with what.
pub fn title(args: &ServeBenchArgs, what: &str) -> Result<()> {
    let ServeBenchArgs { clients, prompt_tokens, tokens, shared_prefix, .. } = args;
    let shared = match shared_prefix {
        0 => String::new(),
        shared => format!(", {shared} of them shared"),
    };
    Ok(say!("{what}: {clients} clients, {prompt_tokens}{shared} + {tokens} tokens\n")?)
}

/// Several reports, one a line.
pub fn table<'a>(reports: impl Iterator<Item = (&'static str, &'a Report)>) -> Result<()> {
    let latencies = "first token, ms: p50 / p95 / p99   between tokens, ms: p50 / p95 / p99";
    say!("                        streams  tokens/s   {latencies}")?;
    for (name, report) in reports {
        let ms = |percentiles: Option<Percentiles>| {
            let [p50, p95, p99] = percentiles.map_or([f64::NAN; 3], Percentiles::milliseconds);
            format!("{p50:>10.1} {p95:>10.1} {p99:>10.1}  ")
        };
        let (whole, rate) = (report.whole, report.tokens_per_second);
        let (first, between) = (ms(report.first_token_seconds), ms(report.between_tokens_seconds));
        say!("{name:<22} {whole:>8} {rate:>9.1}   {first} {between}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let of = |n: u32| Percentiles::of((1..=n).rev().map(f64::from).collect());
        let Some(Percentiles { p50, p95, p99 }) = of(200) else { panic!("no percentiles") };
        assert_eq!((p50, p95, p99), (100.0, 190.0, 198.0));
        assert_eq!(of(1).map(|p| (p.p50, p.p99)), Some((1.0, 1.0)));
        assert!(of(0).is_none());
    }
}
