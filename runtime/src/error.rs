//! The one error type of this crate. Every message is one line: what, where, expected, got.

use std::io;
use std::path::{Path, PathBuf};

use gptq_input::{short, short_line, short_path};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // Messages are whole, with what their sources say: a program that prints the chain leaves out what was said already.
    #[error("{}: {cause}", short_path(path))]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },

    #[error("{}: not valid JSON: {problem}", short_path(path))]
    Json { path: PathBuf, problem: String },

    /// A key of a JSON file that is missing, of the wrong type or out of range.
    #[error(
        "{}: {}: expected {}, got {}",
        short_path(path),
        short(key),
        short_line(expected),
        short_line(got)
    )]
    Config { path: PathBuf, key: String, expected: String, got: String },

    #[error(
        "{}: architecture {} is not supported, expected one of {supported}",
        short_path(path),
        short(name)
    )]
    UnsupportedArchitecture { path: PathBuf, name: String, supported: String },

    #[error("unknown architecture preset {}, expected one of {known}", short(name))]
    UnknownPreset { name: String, known: String },

    /// A quantization setting that means nothing.
    #[error("{key}: expected {expected}, got {got}")]
    QuantSetting { key: &'static str, expected: String, got: String },

    #[error("{linear}: {bits} bits need {dimension} to be a multiple of {multiple}, got {size}")]
    Unquantizable { linear: String, dimension: &'static str, bits: u32, multiple: usize, size: usize },

    /// A safetensors file, or a folder of them, that breaks its format.
    #[error("{}: {}", short_path(path), short_line(problem))]
    File { path: PathBuf, problem: String },

    #[error("{}: tensor {} is missing", short_path(path), short(name))]
    MissingTensor { path: PathBuf, name: String },

    #[error(
        "{}: {}: expected {}, got {}",
        short_path(path),
        short(name),
        short_line(expected),
        short_line(got)
    )]
    WrongTensor { path: PathBuf, name: String, expected: String, got: String },

    #[error("{}: {}: expected finite values, got {value} at element {index}", short_path(path), short(name))]
    NotFinite { path: PathBuf, name: String, index: usize, value: f32 },

    #[error("{}: expected a new or empty folder, got one that has {}", short_path(path), short(found))]
    NotEmpty { path: PathBuf, found: String },

    /// Something in a model folder that would make numbers wrong.
    #[error("{0}")]
    Finding(Box<crate::soundness::Finding>),

    #[error("{tensor}: {problem}")]
    Unsound { tensor: String, problem: String },

    #[error("prompt: expected 1 to {} tokens, got {tokens}", limit.saturating_sub(1))]
    Prompt { tokens: usize, limit: usize },

    /// The caller asked for it.
    #[error("stopped before the end")]
    Stopped,

    #[error("the token at place {place}: expected scores, got none that is a finite number")]
    NoScore { place: usize },

    #[error("{name}: expected {expected}, got {got}")]
    Parameter { name: &'static str, expected: &'static str, got: f32 },

    #[error(
        "KV cache: expected room for {tokens} tokens, got {fits} within {share} of {:.1} GB of memory; \
         lower --max-total-tokens or --max-batch-prefill-tokens, or raise --cuda-memory-fraction",
        *available as f64 / 1e9
    )]
    CacheRoom { tokens: usize, fits: usize, share: f64, available: usize },

    #[error("prompt: expected token ids below {vocab}, got {id}")]
    PromptId { id: u32, vocab: usize },

    #[error("evaluation: expected windows of one length, at least 2 tokens, got {windows} of {ctx}")]
    Windows { windows: usize, ctx: usize },

    #[error("baseline: expected a vocabulary of {model} tokens as the model's, got {baseline}")]
    Vocabulary { model: usize, baseline: usize },

    #[error(transparent)]
    Kernels(#[from] gptq_kernels::Error),
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |cause| Self::Io { path: path.into(), cause }
    }
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
