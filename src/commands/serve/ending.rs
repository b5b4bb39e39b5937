//! How a server ends: by a signal, by a second one, or because its engine did.

use std::future::Future;
use std::process;
use std::time::Duration;

use anyhow::Result;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An engine may take this long to see that all its clients are gone; a step on a processor takes seconds, loading a model
/// minutes, and nothing of either is worth waiting for.
const ENGINE_ENDS: Duration = Duration::from_secs(3);
/// Clients of a dead engine may take this long to hear of it.
const BAD_NEWS: Duration = Duration::from_secs(5);

/// Tells the server to stop. A second signal ends the process at once.
pub struct Stop {
    sender: watch::Sender<bool>,
}

impl Stop {
    /// Listens to SIGINT and SIGTERM from now on.
    pub fn on_signals(runtime: &Runtime) -> Result<Self> {
        let _context = runtime.enter();
        let (sender, _) = watch::channel(false);
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let first = sender.clone();
        runtime.spawn(async move {
            loop {
                let kind = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                };
                if first.send_replace(true) {
                    tracing::warn!("a second signal: ending at once");
                    process::exit(128 + kind.as_raw_value());
                }
            }
        });
        Ok(Self { sender })
    }

    /// Done once the server is to stop.
    pub fn asked(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut receiver = self.sender.subscribe();
        async move {
            // The sender lives as long as the process.
            let _ = receiver.wait_for(|stop| *stop).await;
        }
    }

    pub fn now(&self) {
        self.sender.send_replace(true);
    }
}

/// To be called when the server has stopped: ends the process where the engine computes on.
pub fn limit_engine(code: i32) {
    std::thread::spawn(move || {
        std::thread::sleep(ENGINE_ENDS);
        tracing::warn!("the engine still computes: ending without it");
        process::exit(code)
    });
}

/// Waits for the server, once the engine has ended.
pub fn wait(
    runtime: &Runtime,
    listening: JoinHandle<std::io::Result<()>>,
    failed: bool,
) -> std::io::Result<()> {
    let ended = async { listening.await.map_err(std::io::Error::other)? };
    runtime.block_on(async {
        if !failed {
            return ended.await;
        }
        // The process ends with the engine's error either way.
        tokio::time::timeout(BAD_NEWS, ended).await.unwrap_or(Ok(()))
    })
}
