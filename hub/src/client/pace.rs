//! When to ask again. A wait that the server demands holds for all workers.

use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::settings::Patience;

/// The gate that every request goes through.
#[derive(Default)]
pub(crate) struct Pace {
    until: Mutex<Option<Instant>>,
}

impl Pace {
    /// Closes the gate for this long. False where it was closed for as long already.
    pub fn hold(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut until = self.until.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Answers to requests that were on their way come within a moment and say the same.
        let news = until.is_none_or(|until| end > until + pause / 4);
        *until = until.max(Some(end));
        news
    }

    /// Returns once the gate is open.
    pub fn wait(&self) {
        loop {
            let until = *self.until.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if !left.is_zero() => std::thread::sleep(left),
                _ => return,
            }
        }
    }
}

/// How often something was tried without progress.
pub(crate) struct Tries {
    patience: Patience,
    made: u32,
    waits: u32,
}

/// A server that asks to wait again and again will not answer.
const MOST_WAITS: u32 = 10;

impl Tries {
    pub fn new(patience: &Patience) -> Self {
        Self { patience: *patience, made: 0, waits: 0 }
    }

    pub fn made(&self) -> u32 {
        self.made
    }

    /// Something has arrived: counting begins anew.
    pub fn progress(&mut self) {
        (self.made, self.waits) = (0, 0);
    }

    /// How long to wait before the next try; None after the last.
    pub fn failed(&mut self) -> Option<Duration> {
        self.made += 1;
        let doubled = self.patience.back_off * 2u32.saturating_pow(self.made - 1).min(64);
        (self.made < self.patience.tries).then(|| doubled.mul_f64(0.75 + 0.5 * unit()))
    }

    /// None after too many waits in a row.
    pub fn limited(&mut self) -> Option<()> {
        self.waits += 1;
        (self.waits <= MOST_WAITS).then_some(())
    }
}

/// Between 0 and 1, another one each time, so that clients that failed together do not come back together.
fn unit() -> f64 {
    let bits = RandomState::new().hash_one(0u8);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end_and_progress_begins_anew() {
        let patience = Patience { back_off: Duration::from_secs(1), tries: 5, ..Patience::default() };
        let mut tries = Tries::new(&patience);
        let within = |pause: Option<Duration>, seconds: f64| {
            let pause = pause.unwrap().as_secs_f64();
            assert!(pause >= 0.75 * seconds && pause <= 1.25 * seconds, "{pause}");
        };
        for seconds in [1.0, 2.0, 4.0, 8.0] {
            within(tries.failed(), seconds);
        }
        assert_eq!(tries.failed(), None);
        tries.progress();
        within(tries.failed(), 1.0);
    }

    #[test]
    fn one_demand_holds_everybody_and_is_told_once() {
        let pace = Pace::default();
        let start = Instant::now();
        let pause = Duration::from_millis(60);
        assert!(pace.hold(pause));
        assert!(!pace.hold(pause));
        std::thread::scope(|scope| {
            let waits: Vec<_> = (0..4).map(|_| scope.spawn(|| pace.wait())).collect();
            waits.into_iter().for_each(|wait| wait.join().unwrap());
        });
        assert!(start.elapsed() >= pause);
    }
}
