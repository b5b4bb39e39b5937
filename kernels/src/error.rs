//! The one error type of this crate: which operation, what it expected, what it got.

use std::fmt::Debug;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{op}: expected {expected}, got {got}")]
    Shape { op: &'static str, expected: String, got: String },

    #[error("the Hessian is not positive definite: pivot {pivot} of {size}")]
    NotPositiveDefinite { pivot: usize, size: usize },

    #[error("{op}: {value} cannot be stored ({why})")]
    Unrepresentable { op: &'static str, value: String, why: &'static str },

    #[error("{op}: {problem}")]
    Cuda { op: &'static str, problem: String },

    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A shape error; `expected` and `got` are shown as `Debug` prints them.
    pub fn shape(op: &'static str, expected: impl Debug, got: impl Debug) -> Self {
        let show = |value: &dyn Debug| format!("{value:?}").replace('"', "");
        Self::Shape { op, expected: show(&expected), got: show(&got) }
    }

    /// A failure of CUDA or one of its libraries.
    pub(crate) fn cuda(op: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Cuda { op, problem: problem.to_string() }
    }

    /// For `map_err` on driver calls.
    pub(crate) fn driver(op: &'static str) -> impl FnOnce(cudarc::driver::DriverError) -> Self {
        move |error| Self::Cuda { op, problem: error.to_string() }
    }
}

/// A shape error unless an operation got what it expected.
pub(crate) fn expect<T: PartialEq + Debug>(op: &'static str, expected: T, got: T) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::shape(op, expected, got)) }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
