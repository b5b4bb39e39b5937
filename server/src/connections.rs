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
use tokio_io_timeout::TimeoutStream;

/// What runs when the server is asked to stop may take this long to end.
const GRACE: Duration = Duration::from_secs(85);
/// And requests that are cut off then have this long to receive their error.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// A machine out of file descriptors has some again when other connections end.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Answers connections until `stop` is done, then until the open ones have their answers. `cut` is called where
/// that takes too long, and must end all answers. A request's head may take `patience`, and so may the pause between
/// two requests of a connection; a client that takes nothing of its answer for so long has left.
pub async fn run(
    listener: TcpListener,
    router: Router,
    patience: Duration,
    stop: impl Future<Output = ()>,
    cut: impl FnOnce(),
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(patience);
    let connections = GracefulShutdown::new();
    let mut stop = pin!(stop);
    while let Some(stream) = next(&listener, &mut stop).await {
        let service = TowerToHyperService::new(router.clone());
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(patience));
        let stream = TokioIo::new(Box::pin(stream));
        let connection = connections.watch(http.serve_connection(stream, service));
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Write;

    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use futures_util::stream;
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    use super::*;

    /// An answer without an end; says when it begins, and its sender is dropped with it.
    async fn endless(sender: UnboundedSender<()>) -> Body {
        sender.send(()).unwrap();
        let piece = move || {
            let _alive = &sender;
            Some(Ok::<_, Infallible>(Bytes::from_static(&[0; 1 << 16])))
        };
        Body::from_stream(stream::iter(std::iter::from_fn(piece)))
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_of_its_answer_loses_its_place() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, mut answers) = unbounded_channel();
        let router = Router::new().route("/", get(move || endless(sender.clone())));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(run(
            listener,
            router,
            Duration::from_millis(200),
            async {
                let _ = stopped.await;
            },
            || (),
        ));
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n").unwrap();
        assert_eq!(answers.recv().await, Some(()));
        drop(stop);
        // Ends once every connection has, which this one never does by itself.
        tokio::time::timeout(Duration::from_secs(20), server).await.unwrap().unwrap();
        assert_eq!(answers.recv().await, None);
        drop(client);
    }
}
