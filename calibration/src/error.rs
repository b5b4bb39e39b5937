//! The one error type of this crate. Each message is one line: what, where, expected, got.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use gptq_input::{short, short_line, short_path};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{}: {cause}", short_path(path))]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },

    /// `looked_for` lists every place that was tried.
    #[error("{what} not found: looked for {looked_for}")]
    NotFound { what: String, looked_for: String },

    /// A command-line value that does not parse.
    #[error("{what}: expected {expected}, got `{}`", short(got))]
    Parse { what: &'static str, expected: &'static str, got: String },

    /// A file (or embedded text) that can be read but not understood. `at` is its path or name, with the line
    /// or row where one is known.
    #[error("{at}: {problem}")]
    Malformed { at: String, problem: String },

    /// Encoding the text failed.
    #[error(transparent)]
    Text(#[from] gptq_text::Error),

    #[error(
        "the text is too short: {asked} distinct windows of {seq_len} tokens asked, {fit} fit in {tokens} tokens"
    )]
    TextTooShort { asked: usize, fit: usize, seq_len: usize, tokens: usize },

    #[error("{0} must be at least 1, got 0")]
    Zero(&'static str),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { path: path.to_path_buf(), cause }
    }

    pub(crate) fn malformed(at: impl Display, problem: impl Display) -> Self {
        Self::Malformed {
            at: short_path(Path::new(&at.to_string())),
            problem: short_line(&problem.to_string()),
        }
    }
}
