//! The one error type of this crate. Each message is one line: what, where, expected, got.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use gptq_input::{short_line, short_path};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{}: {cause}", short_path(path))]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },

    /// A file (or its contents) that can be read but not understood. `at` is its path or name.
    #[error("{at}: {problem}")]
    Malformed { at: String, problem: String },

    #[error("the tokenizer cannot {action}: {cause}")]
    Tokenizer { action: &'static str, cause: String },

    #[error(
        "{}: no chat template (expected chat_template.jinja, or `chat_template` in tokenizer_config.json)",
        short_path(Path::new(at))
    )]
    NoChatTemplate { at: String },

    /// The messages are none that a prompt can be made of.
    #[error("{}", short_line(.0))]
    Conversation(String),

    /// The template does not compile, failed, broke a limit, or refused the messages through `raise_exception`.
    #[error("chat template: {0}")]
    ChatTemplate(String),
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
