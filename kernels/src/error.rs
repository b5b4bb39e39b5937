//! The one error type of this crate: which operation, what it expected, what it got.

use std::fmt::Debug;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{op}: expected {expected}, got {got}")]
    Shape { op: &'static str, expected: String, got: String },

    #[error("the Hessian is not positive definite: pivot {pivot} of {size}")]
    NotPositiveDefinite { pivot: usize, size: usize },

    #[error("{op}: {value} cannot be stored ({why})")]
    Unrepresentable { op: &'static str, value: String, why: &'static str },

    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A shape error; `expected` and `got` are shown as `Debug` prints them.
    pub fn shape(op: &'static str, expected: impl Debug, got: impl Debug) -> Self {
        let show = |value: &dyn Debug| format!("{value:?}").replace('"', "");
        Self::Shape { op, expected: show(&expected), got: show(&got) }
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
