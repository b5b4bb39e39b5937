//! Figures in Prometheus' text format, with TGI's names where they exist.

use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::http::StatusCode;
use gptq_runtime::engine::EngineStats;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, Result, TextEncoder,
    exponential_buckets, linear_buckets,
};

use super::ServerLimits;

/// Upper bounds of a histogram of tokens.
const TOKEN_BUCKETS: usize = 50;

pub struct Metrics {
    registry: Registry,
    /// HTTP requests by path and status.
    http: IntCounterVec,
    asked: IntCounter,
    success: IntCounter,
    failure: IntCounterVec,
    input_length: Histogram,
    generated_tokens: Histogram,
    duration: Histogram,
    queue: Histogram,
    inference: Histogram,
    time_per_token: Histogram,
}

/// A generation that is complete.
pub struct Finished {
    pub input_length: usize,
    pub tokens: usize,
    /// From its arrival to its first step.
    pub queue: Duration,
    /// From there to its last token.
    pub inference: Duration,
}

impl Metrics {
    pub fn new(limits: &ServerLimits) -> Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let tokens = |limit: usize| {
            linear_buckets(0.0, (limit as f64 / TOKEN_BUCKETS as f64).ceil(), TOKEN_BUCKETS + 1)
        };
        // 0.1 ms to 3 minutes, each bound half as much again.
        let seconds = || exponential_buckets(1e-4, 1.5, 36);
        Ok(Self {
            http: counters(r, "gptq_http_requests_total", "HTTP requests", &["path", "status"])?,
            asked: counter(r, "tgi_request_count", "Generations asked for")?,
            success: counter(r, "tgi_request_success", "Generations that were completed")?,
            failure: counters(r, "tgi_request_failure", "Requests that were not", &["err"])?,
            input_length: histogram(
                r,
                "tgi_request_input_length",
                "Tokens of a prompt",
                tokens(limits.max_input_tokens)?,
            )?,
            generated_tokens: histogram(
                r,
                "tgi_request_generated_tokens",
                "Tokens of an answer",
                tokens(limits.max_total_tokens)?,
            )?,
            duration: histogram(r, "tgi_request_duration", "Seconds from arrival to last token", seconds()?)?,
            queue: histogram(
                r,
                "tgi_request_queue_duration",
                "Seconds from arrival to first step",
                seconds()?,
            )?,
            inference: histogram(
                r,
                "tgi_request_inference_duration",
                "Seconds from first step to last token",
                seconds()?,
            )?,
            time_per_token: histogram(
                r,
                "tgi_request_mean_time_per_token_duration",
                "Seconds of inference a token",
                seconds()?,
            )?,
            registry,
        })
    }

    /// Unknown paths share one entry: clients must not make the table grow.
    pub fn http(&self, path: &str, status: StatusCode) {
        let path = if status == StatusCode::NOT_FOUND { "other" } else { path };
        self.http.with_label_values(&[path, status.as_str()]).inc();
    }

    pub fn asked(&self) {
        self.asked.inc();
    }

    pub fn failed(&self, kind: &'static str) {
        self.failure.with_label_values(&[kind]).inc();
    }

    pub fn finished(&self, generation: &Finished) {
        let Finished { input_length, tokens, queue, inference } = generation;
        self.success.inc();
        self.input_length.observe(*input_length as f64);
        self.generated_tokens.observe(*tokens as f64);
        self.duration.observe((*queue + *inference).as_secs_f64());
        self.queue.observe(queue.as_secs_f64());
        self.inference.observe(inference.as_secs_f64());
        self.time_per_token.observe(inference.as_secs_f64() / (*tokens).max(1) as f64);
    }

    pub fn text(&self, engine: &EngineStats) -> Result<String> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        let mut add = |name: &str, kind: &str, value: u64| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
        };
        add("tgi_queue_size", "gauge", engine.waiting.load(Relaxed) as u64);
        add("tgi_batch_current_size", "gauge", engine.running.load(Relaxed) as u64);
        add("gptq_kv_cache_blocks_used", "gauge", engine.used_blocks.load(Relaxed) as u64);
        add("gptq_kv_cache_blocks_total", "gauge", engine.total_blocks.load(Relaxed) as u64);
        add("gptq_steps_total", "counter", engine.steps.load(Relaxed));
        add("gptq_generated_tokens_total", "counter", engine.tokens.load(Relaxed));
        add("gptq_prefix_cached_tokens_total", "counter", engine.cached_tokens.load(Relaxed));
        add("gptq_preemptions_total", "counter", engine.preemptions.load(Relaxed));
        Ok(text)
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter> {
    let counter = IntCounter::new(name, help)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
    let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(counters.clone()))?;
    Ok(counters)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: Vec<f64>) -> Result<Histogram> {
    let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
    registry.register(Box::new(histogram.clone()))?;
    Ok(histogram)
}
