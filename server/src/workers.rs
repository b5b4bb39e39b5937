//! Work on texts: parsing, rendering and tokenizing take time and memory with the text's length, so they run aside from
//! the connections, and only so many at a time.

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::error::ApiError;

/// Bytes that a tokenizer reads in a few milliseconds.
const SHORT: usize = 16 << 10;
/// Short texts do not wait for long ones.
const SHORT_AT_ONCE: usize = 4;
const LONG_AT_ONCE: usize = 2;

/// Places for work on short texts and on long ones.
pub struct Workers {
    short: Semaphore,
    long: Semaphore,
}

impl Default for Workers {
    fn default() -> Self {
        Self { short: Semaphore::new(SHORT_AT_ONCE), long: Semaphore::new(LONG_AT_ONCE) }
    }
}

impl Workers {
    /// Runs `work` on a text of so many bytes when its turn comes. A caller that leaves before has asked for nothing; one
    /// that leaves later keeps its place busy until the work is done, which cannot be stopped.
    ///
    /// # Errors
    /// What `work` says, or that it panicked.
    pub async fn run<T: Send + 'static>(
        self: &std::sync::Arc<Self>,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let workers = self.clone();
        let short = bytes <= SHORT;
        let places = if short { &self.short } else { &self.long };
        let place = places.acquire().await.map_err(|_| ApiError::unhealthy())?;
        // Given back by the work itself, which may outlive its caller.
        place.forget();
        let done = spawn_blocking(move || {
            let places = if short { &workers.short } else { &workers.long };
            let _back = GiveBack(places);
            work()
        });
        done.await.unwrap_or_else(|_| Err(ApiError::internal("reading the request failed")))
    }
}

/// Gives a place back, also where the work panics.
struct GiveBack<'a>(&'a Semaphore);

impl Drop for GiveBack<'_> {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Duration;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn long_texts_run_two_at_a_time_short_ones_pass_them_and_a_panic_frees_its_place() {
        let workers = Arc::new(Workers::default());
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let long = |i: usize| {
            let (workers, running, most) = (workers.clone(), running.clone(), most.clone());
            tokio::spawn(async move {
                let work = move || {
                    most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
                    std::thread::sleep(Duration::from_millis(50));
                    running.fetch_sub(1, SeqCst);
                    assert_ne!(i, 0, "the first one panics");
                    Ok(i)
                };
                workers.run(SHORT + 1, work).await
            })
        };
        let all: Vec<_> = (0..6).map(long).collect();
        let short = tokio::time::timeout(Duration::from_millis(40), workers.run(1, || Ok(7))).await;
        assert_eq!(short.unwrap().unwrap(), 7);
        let mut failed = 0;
        for one in all {
            failed += usize::from(one.await.unwrap().is_err());
        }
        assert_eq!((failed, most.load(SeqCst)), (1, 2));
        assert_eq!(workers.long.available_permits(), LONG_AT_ONCE);
    }
}
