//! The chat page: three files that ask for nothing from elsewhere.

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// Only the page's own files and the server's own routes, and no place inside another site's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    // A newer program's page must not run with an older one's script.
    (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
];

/// The file at a path; `None` where the page has none there.
pub fn file(path: &str) -> Option<Response> {
    let (kind, text) = match path {
        "/" => ("text/html; charset=utf-8", include_str!("chat.html")),
        "/chat.css" => ("text/css; charset=utf-8", include_str!("chat.css")),
        "/chat.js" => ("text/javascript; charset=utf-8", include_str!("chat.js")),
        _ => return None,
    };
    Some((HEADERS, [(header::CONTENT_TYPE, kind)], text).into_response())
}
