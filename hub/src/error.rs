//! The one error type of this crate: what was asked for, and why it did not come. One line each.

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

use gptq_input::{short, short_line, short_path};

use crate::name::RepoId;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What something was about. Parts that are not known, or do not matter, are left out of messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    pub repo: Option<RepoId>,
    pub revision: Option<String>,
    pub file: Option<String>,
}

impl Subject {
    pub fn repo(repo: &RepoId) -> Self {
        Self { repo: Some(repo.clone()), ..Self::default() }
    }

    pub fn revision(repo: &RepoId, revision: &str) -> Self {
        Self { revision: Some(revision.to_owned()), ..Self::repo(repo) }
    }

    pub fn file(&self, file: &str) -> Self {
        Self { file: Some(file.to_owned()), ..self.clone() }
    }

    pub(crate) fn fails(&self, cause: Cause) -> Error {
        Error { subject: Box::new(self.clone()), cause: Box::new(cause) }
    }

    pub(crate) fn io(&self, path: &Path) -> impl Fn(io::Error) -> Error + use<> {
        let (subject, path) = (self.clone(), path.to_owned());
        move |cause| subject.fails(Cause::Io { path: path.clone(), cause })
    }
}

impl Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(repo) = &self.repo {
            write!(f, "{repo}")?;
            if let Some(revision) = self.revision.as_ref().filter(|revision| *revision != crate::name::MAIN) {
                write!(f, ":{}", short(revision))?;
            }
            f.write_str(": ")?;
        }
        match &self.file {
            Some(file) => write!(f, "{}: ", short(file)),
            None => Ok(()),
        }
    }
}

/// A failure, with the repository, the revision and the file that it is about.
#[derive(Debug, thiserror::Error)]
#[error("{subject}{cause}")]
pub struct Error {
    pub subject: Box<Subject>,
    #[source]
    pub cause: Box<Cause>,
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Subject::default().fails(cause)
    }
}

/// Why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    #[error("{what}: expected {expected}, got `{}`", short(got))]
    Name { what: &'static str, expected: &'static str, got: String },

    #[error("{name}: expected {expected}, got `{}`", short(got))]
    Setting { name: &'static str, expected: &'static str, got: String },

    #[error(
        "HOME is not set, and neither are HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME: no place for the hub cache"
    )]
    NoHome,

    #[error("not found, or private: HF_TOKEN is not set")]
    NotFoundWithoutToken,

    #[error("{endpoint} refused the token from {from}")]
    TokenRefused { endpoint: String, from: String },

    #[error("no such repository, or this token may not see it")]
    NoRepo,

    #[error("no such revision{}", list("branches", branches))]
    NoRevision { branches: Vec<String> },

    #[error("no such file in the repository{}", list("files", files))]
    NoFile { files: Vec<String> },

    #[error("no file is selected{}", list("files", files))]
    NothingSelected { files: Vec<String> },

    #[error("gated: ask for access at {page}")]
    Gated { page: String },

    #[error("this token may not write here{}", said(message))]
    MayNotWrite { message: String },

    #[error("refused{}", said(message))]
    Forbidden { message: String },

    /// A commit whose parent is no longer the branch's head.
    #[error("the branch has changed meanwhile")]
    ParentMoved,

    #[error("the server is busy with the same thing{}", said(message))]
    Busy { message: String },

    #[error("too many requests: the server asks to wait {seconds} s")]
    RateLimited { seconds: u64 },

    #[error("the server fails with {status}{}", said(message))]
    Server { status: u16, message: String },

    #[error("unexpected answer {status}{}", said(message))]
    Unexpected { status: u16, message: String },

    #[error("storage at {host} refused it{}", said(message))]
    StorageRefused { host: String, message: String },

    #[error("{endpoint} is not a model hub: {problem}")]
    NotAHub { endpoint: String, problem: &'static str },

    #[error("{endpoint} answered what cannot be read: {}", short_line(problem))]
    Malformed { endpoint: String, problem: String },

    /// A redirect that the token must not follow, without what would tell that the right file lies there.
    #[error("{host} is redirected to without the hash of the file")]
    BlindRedirect { host: String },

    #[error("a file name that leaves the folder: `{}`", short(name))]
    UnsafeName { name: String },

    #[error("the size has changed: expected {expected} bytes, the server says otherwise")]
    Changed { expected: u64 },

    #[error("arrived damaged {times} times: expected {expected}, got {got}")]
    Damaged { times: u32, expected: String, got: String },

    #[error("needs {}, {} has {}", bytes(*needs), short_path(dir), bytes(*has))]
    Disk { needs: u64, has: u64, dir: PathBuf },

    #[error("cannot reach {host}{}: {}", via(proxy), short_line(cause))]
    Unreachable { host: String, proxy: Option<String>, cause: String },

    #[error("the connection to {host} broke: {}", short_line(cause))]
    Broken { host: String, cause: String },

    #[error("{} is not in {}, and the hub is switched off ({switch})", short(missing), short_path(dir))]
    Offline { missing: String, dir: PathBuf, switch: &'static str },

    #[error("{}: {cause}", short_path(path))]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },

    #[error("publishing needs a token that may write: set HF_TOKEN")]
    NoToken,

    #[error("the repository is public, although a private one was asked for: nothing was sent")]
    NotPrivate,

    #[error("the file has changed while it was being sent")]
    ChangedHere,

    /// After all was sent.
    #[error("the branch does not hold what was sent: {}", short(what))]
    Differs { what: String },

    /// Another worker has failed, and its error is reported.
    #[error("given up")]
    GivenUp,
}

/// At most twelve of them.
fn list(what: &str, names: &[String]) -> String {
    const MOST: usize = 12;
    if names.is_empty() {
        return String::new();
    }
    let shown: Vec<_> = names.iter().take(MOST).map(|name| short(name)).collect();
    let more = names.len().saturating_sub(MOST);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("; the {what} there: {}{rest}", shown.join(", "))
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {}", short_line(message)) }
}

fn via(proxy: &Option<String>) -> String {
    proxy.as_ref().map_or(String::new(), |proxy| format!(" (proxy {proxy})"))
}

/// A size as people say it.
pub fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} KB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_that_names_repository_revision_and_file() {
        let repo = RepoId::model("acme/tiny").unwrap();
        let branches = (0..20).map(|i| format!("b{i}")).collect();
        let error = Subject::revision(&repo, "dev").fails(Cause::NoRevision { branches }).to_string();
        assert!(error.starts_with("acme/tiny:dev: no such revision; the branches there: b0, b1,"), "{error}");
        assert!(error.ends_with("b11 and 8 more"), "{error}");
        let file = Subject::revision(&repo, "main").file("a\nb");
        let disk = Cause::Disk { needs: 5_000_000_000, has: 1_500, dir: "/cache".into() };
        assert_eq!(file.fails(disk).to_string(), "acme/tiny: a\\nb: needs 5.00 GB, /cache has 1.5 KB");
        let server = Cause::Server { status: 500, message: "line\nline".into() };
        assert_eq!(Error::from(server).to_string(), "the server fails with 500: line\\nline");
    }
}
