//! Ctrl-C: stops an answer; the program where there is none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result};

/// What shells report for a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

pub struct Interrupt {
    answering: AtomicBool,
    /// The answer was interrupted.
    pub stopped: AtomicBool,
}

impl Interrupt {
    /// Listens from now on.
    pub fn listen() -> Result<Arc<Self>> {
        let interrupt = Arc::new(Self { answering: AtomicBool::new(false), stopped: AtomicBool::new(false) });
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("signals")?;
        let shared = interrupt.clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                while tokio::signal::ctrl_c().await.is_ok() {
                    if !shared.answering.load(Relaxed) {
                        let _ = say!("");
                        end();
                    }
                    shared.stopped.store(true, Relaxed);
                }
            });
        });
        Ok(interrupt)
    }

    pub fn answering(&self, answering: bool) {
        self.stopped.store(false, Relaxed);
        self.answering.store(answering, Relaxed);
    }
}

/// Ends the program as an interrupted one.
pub fn end() -> ! {
    std::process::exit(INTERRUPTED)
}
