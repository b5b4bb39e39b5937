//! Refusals and failures, in the shape of the API that was called.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Whose clients are asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Tgi,
    OpenAi,
}

#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into() }
    }

    /// A request that means nothing or exceeds a limit.
    pub fn validation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "validation", message)
    }

    pub fn overloaded() -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", "Model is overloaded")
    }

    pub fn unhealthy() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "healthcheck", "unhealthy")
    }

    pub fn generation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FAILED_DEPENDENCY, "generation", message)
    }

    pub fn incomplete() -> Self {
        let message = "the generation ended before it was complete";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation", message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    pub fn unauthorized() -> Self {
        let message = "expected `Authorization: Bearer KEY` with the server's key";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    pub fn content_type(got: &str) -> Self {
        let message = format!("expected the content type application/json, got {}", got.escape_debug());
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "validation", message)
    }

    pub fn too_large(limit: usize) -> Self {
        let message = format!("expected a body of at most {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "validation", message)
    }

    pub fn slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout", "the body did not arrive in time")
    }

    pub fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("no route {what}"))
    }

    pub fn method(what: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", format!("no such method: {what}"))
    }

    /// The request was turned away; nothing was computed for it.
    pub fn is_refusal(&self) -> bool {
        self.status.is_client_error() && self.status != StatusCode::FAILED_DEPENDENCY
    }

    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::Tgi => json!({"error": self.message, "error_type": self.kind}),
            Dialect::OpenAi => json!({"error": {
                "message": self.message, "type": self.kind, "param": null, "code": self.status.as_u16(),
            }}),
        }
    }

    pub fn respond(&self, dialect: Dialect) -> Response {
        let mut response = (self.status, Json(self.body(dialect))).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
