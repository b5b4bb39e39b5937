//! The second port, which holds the large files: an address is permission to fetch, and a token is refused.

use std::io;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};

use crate::fault::{On, What};
use crate::{Shared, parameter};

pub fn routes(hub: Shared) -> Router {
    Router::new()
        .route("/objects/{oid}", get(object).put(put))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(hub)
}

async fn object(State(hub): State<Shared>, Path(oid): Path<String>, headers: HeaderMap) -> Response {
    let mut world = hub.lock();
    let what = world.strike(On::Storage);
    // A signed address together with a token is refused, as S3 does.
    if headers.contains_key("authorization") {
        return (StatusCode::BAD_REQUEST, "Only one auth mechanism allowed").into_response();
    }
    let in_repos = || {
        let commits = world.repos.values().flat_map(|repo| repo.commits.values());
        commits.flat_map(|files| files.values()).find(|file| file.oid == oid).map(|file| file.bytes.clone())
    };
    let Some(bytes) = world.objects.get(&oid).cloned().or_else(in_repos) else {
        return (StatusCode::NOT_FOUND, "no such key").into_response();
    };
    let answer = answer(&bytes, &headers, what);
    let length =
        answer.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    world.sent += length.unwrap_or(0);
    answer
}

/// A whole large file, or a part of it.
async fn put(
    State(hub): State<Shared>,
    Path(oid): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let what = hub.lock().strike(On::Upload);
    match what {
        Some(What::Slow(pause)) => tokio::time::sleep(Duration::from_millis(pause)).await,
        Some(what) => return fail(&what),
        None => {}
    }
    let mut world = hub.lock();
    if headers.contains_key("authorization") {
        return (StatusCode::BAD_REQUEST, "Only one auth mechanism allowed").into_response();
    }
    match parameter(&query, "part").and_then(|part| part.parse().ok()) {
        Some(part) => {
            let upload = parameter(&query, "upload").and_then(|upload| upload.parse().ok());
            let Some(parts) = upload.and_then(|upload: u64| world.uploads.get_mut(&upload)) else {
                return (StatusCode::NOT_FOUND, "NoSuchUpload").into_response();
            };
            let etag = crate::git_oid(&body);
            parts.insert(part, body);
            world.parts += 1;
            ([("etag", format!("\"{etag}\""))], "").into_response()
        }
        None if crate::sha256(&body) != oid => (StatusCode::BAD_REQUEST, "BadDigest").into_response(),
        None => {
            world.objects.insert(oid, body);
            StatusCode::OK.into_response()
        }
    }
}

/// The answer that a fault makes instead of another.
pub fn fail(what: &What) -> Response {
    match what {
        What::TooMany(seconds) => {
            let headers = [
                ("ratelimit", format!("\"api\";r=0;t={seconds}")),
                ("ratelimit-policy", "\"fixed window\";\"api\";q=500;w=300".to_owned()),
            ];
            (StatusCode::TOO_MANY_REQUESTS, headers, "slow down").into_response()
        }
        What::Status(status) => {
            let page = format!("<html><title>error</title><body>fails with {status}</body></html>");
            (StatusCode::from_u16(*status).unwrap(), [("content-type", "text/html")], page).into_response()
        }
        _ => (StatusCode::OK, [("content-type", "text/html")], "<html>welcome</html>").into_response(),
    }
}

/// A file or the range of it that was asked for, spoilt by the fault.
pub fn answer(bytes: &Bytes, headers: &HeaderMap, what: Option<What>) -> Response {
    if let Some(fault @ (What::Status(_) | What::TooMany(_) | What::Page)) = &what {
        return fail(fault);
    }
    let size = bytes.len();
    let range = headers.get("range").and_then(|value| parse(value.to_str().ok()?, size));
    let range = range.filter(|_| what != Some(What::IgnoreRange));
    let (from, to) = range.unwrap_or((0, size));
    if from >= size && range.is_some() {
        return (StatusCode::RANGE_NOT_SATISFIABLE, [("content-range", format!("bytes */{size}"))])
            .into_response();
    }
    let mut part = bytes.slice(from..to);
    if what == Some(What::WrongBytes) {
        part = part.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>().into();
    }
    if let Some(What::Short(length)) = what {
        part = part.slice(..length.min(part.len()));
    }
    let (status, place) = match range {
        None => (StatusCode::OK, None),
        Some(_) if what == Some(What::WrongRange) => {
            (StatusCode::PARTIAL_CONTENT, Some(format!("bytes 0-{}/{size}", part.len() - 1)))
        }
        Some(_) => (StatusCode::PARTIAL_CONTENT, Some(format!("bytes {from}-{}/{size}", to - 1))),
    };
    let length = part.len().to_string();
    let body = match what {
        Some(What::Cut(after)) => {
            let begun = part.slice(..after.min(part.len()));
            let pieces = [Ok(begun), Err(io::Error::from(io::ErrorKind::ConnectionReset))];
            // The first bytes get away before the connection ends.
            Body::from_stream(stream::iter(pieces).then(|piece| async {
                if piece.is_err() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                piece
            }))
        }
        Some(What::Slow(pause)) => {
            let pieces: Vec<Bytes> = (0..part.len())
                .step_by(64 << 10)
                .map(|at| part.slice(at..part.len().min(at + (64 << 10))))
                .collect();
            Body::from_stream(stream::iter(pieces).then(move |piece| async move {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                Ok::<_, io::Error>(piece)
            }))
        }
        _ => Body::from(part),
    };
    let mut response = (status, [("content-length", length)], body).into_response();
    if let Some(place) = place {
        response.headers_mut().insert("content-range", place.parse().unwrap());
    }
    response
}

/// `bytes=A-B` or `bytes=A-`, as the first byte and the one behind the last.
fn parse(text: &str, size: usize) -> Option<(usize, usize)> {
    let (from, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let from = from.parse().ok()?;
    let to = if last.is_empty() { size } else { last.parse::<usize>().ok()? + 1 };
    Some((from, to.min(size).max(from)))
}
