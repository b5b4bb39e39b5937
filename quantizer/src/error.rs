//! The error type of this crate: one line that says what, where, expected, got.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use gptq_input::{short_line, short_path};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // Messages are whole, with what their sources say: a program that prints the chain leaves out what was said already.
    #[error("layer {layer}, stage {stage}: {cause}")]
    Stage {
        layer: usize,
        stage: String,
        #[source]
        cause: Box<Error>,
    },

    #[error("the Hessian is not positive definite even at damp_percent {last}")]
    Damp { last: f64 },

    #[error("an activation is infinite or NaN")]
    NotFiniteActivations,

    #[error("{}: {}", short_path(path), storage_problem(cause))]
    Io {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },

    #[error("{}: {}", short_path(path), short_line(problem))]
    Output { path: PathBuf, problem: String },

    /// The run was asked to stop. What is done can be resumed.
    #[error("{done} of {layers} layers are done")]
    Stopped { done: usize, layers: usize },

    #[error("{}: {}", short_path(Path::new(place)), short_line(problem))]
    Invalid { place: String, problem: String },

    #[error(transparent)]
    Runtime(#[from] gptq_runtime::Error),

    #[error(transparent)]
    Kernels(#[from] gptq_kernels::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O error with the file it happened to.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |cause| Self::Io { path, cause }
    }

    pub(crate) fn invalid(place: impl Display, problem: impl Display) -> Self {
        Self::Invalid { place: place.to_string(), problem: problem.to_string() }
    }
}

fn storage_problem(cause: &std::io::Error) -> String {
    match cause.kind() {
        std::io::ErrorKind::StorageFull => "the disk is full".into(),
        _ => cause.to_string(),
    }
}
