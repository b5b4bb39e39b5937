//! One request's line in the log.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids of clients are not repeated.
const LONGEST_ID: usize = 128;
/// What proxies log for a client that left before its answer began.
const CLIENT_LEFT: u16 = 499;

/// Logs itself when the last task that works on the answer is done; for a stream that is its end.
pub struct Access {
    pub id: HeaderValue,
    method: Method,
    path: String,
    started: Instant,
    status: AtomicU16,
    pub tokens: AtomicU64,
}

impl Access {
    pub fn new(method: Method, path: String, headers: &HeaderMap) -> Self {
        Self {
            id: request_id(headers),
            method,
            path,
            started: Instant::now(),
            status: AtomicU16::new(CLIENT_LEFT),
            tokens: AtomicU64::new(0),
        }
    }

    pub fn answered(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Relaxed);
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        tracing::info!(
            request = self.id.to_str().unwrap_or_default(),
            method = %self.method,
            path = self.path,
            status = self.status.load(Relaxed),
            seconds = self.started.elapsed().as_secs_f64(),
            tokens = self.tokens.load(Relaxed),
            "request"
        );
    }
}

/// The client's own id where it sent a printable one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let printable = |id: &&HeaderValue| (1..=LONGEST_ID).contains(&id.len()) && id.to_str().is_ok();
    match headers.get(REQUEST_ID).filter(printable) {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&new_id()).unwrap_or(HeaderValue::from_static("-")),
    }
}

/// Unique in this process, and unlikely to repeat in another one.
pub fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{:x}-{:x}", super::clock_seed() >> 10, COUNT.fetch_add(1, Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_spoil_the_log_are_replaced() {
        let id = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            request_id(&headers)
        };
        assert_eq!(id(b"abc-1"), "abc-1");
        for bad in [&b""[..], b"\xff", &[b'a'; 129]] {
            assert!(id(bad).to_str().unwrap().contains('-') && id(bad) != bad);
        }
    }
}
