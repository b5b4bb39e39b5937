//! Counters in Prometheus' text format, with TGI's names where they exist.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};

use axum::http::StatusCode;

use crate::engine::EngineStats;

#[derive(Default)]
pub struct Metrics {
    /// Requests and their seconds until the answer began, by route and status.
    requests: Mutex<BTreeMap<(String, u16), (u64, f64)>>,
}

impl Metrics {
    /// Unknown paths share one entry: clients must not make the table grow.
    pub fn count(&self, path: &str, status: StatusCode, seconds: f64) {
        let known = status != StatusCode::NOT_FOUND;
        let key = (if known { path } else { "other" }.to_owned(), status.as_u16());
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = requests.entry(key).or_default();
        *entry = (entry.0 + 1, entry.1 + seconds);
    }

    pub fn text(&self, engine: &EngineStats) -> String {
        let mut text = String::new();
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
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(text, "# TYPE tgi_request_count counter");
        for ((path, status), (count, _)) in requests.iter() {
            let _ = writeln!(text, "tgi_request_count{{path=\"{path}\",status=\"{status}\"}} {count}");
        }
        let _ = writeln!(text, "# TYPE gptq_request_seconds_total counter");
        for ((path, status), (_, seconds)) in requests.iter() {
            let _ =
                writeln!(text, "gptq_request_seconds_total{{path=\"{path}\",status=\"{status}\"}} {seconds}");
        }
        text
    }
}
