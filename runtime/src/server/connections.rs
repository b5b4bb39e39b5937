//! Connections: how long a client may take to say what it wants, and how all of them end.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

/// What runs when the server is asked to stop may take this long to end.
const GRACE: Duration = Duration::from_secs(85);
/// And what was cut off then may take this long to be told.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// A machine out of file descriptors has some again when other connections end.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Answers connections until `stop` is done, then until the open ones have their answers. `cut` is called where
/// that takes too long, and must end all answers. A request's head may take `head_timeout`, and so may the
/// pause between two requests of a connection.
pub async fn run(
    listener: TcpListener,
    router: Router,
    head_timeout: Duration,
    stop: impl Future<Output = ()>,
    cut: impl FnOnce(),
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_timeout);
    let connections = GracefulShutdown::new();
    let mut stop = pin!(stop);
    while let Some(stream) = next(&listener, &mut stop).await {
        let service = TowerToHyperService::new(router.clone());
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection");
            }
        });
    }
    drop(listener);
    tracing::info!(connections = connections.count(), "stopping");
    let mut ended = pin!(connections.shutdown());
    if tokio::time::timeout(GRACE, &mut ended).await.is_err() {
        cut();
        if tokio::time::timeout(LAST_WORDS, ended).await.is_err() {
            tracing::warn!("some clients did not take their answers");
        }
    }
}

/// The next connection; `None` once `stop` is done.
async fn next(listener: &TcpListener, stop: &mut (impl Future<Output = ()> + Unpin)) -> Option<TcpStream> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut *stop => return None,
        };
        match accepted {
            Ok((stream, _)) => {
                // Tokens are small and must not wait for one another.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                return Some(stream);
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}
