//! Names of models and data sets, of their revisions and files. They become parts of addresses and of paths, so whatever
//! could leave its place is refused here.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use crate::error::{Cause, Error, Result};

/// The revision where none is named.
pub const MAIN: &str = "main";

/// Characters of `owner/name`, and of a revision.
const MOST_CHARACTERS: usize = 96;
const MOST_OF_A_REVISION: usize = 255;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Model,
    Dataset,
}

/// A repository: `owner/name`, of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId {
    pub kind: Kind,
    id: String,
}

impl RepoId {
    /// # Errors
    /// Where `id` is no `owner/name` of letters, digits, `-`, `_` and `.`.
    pub fn new(kind: Kind, id: &str) -> Result<Self> {
        let good = id.len() <= MOST_CHARACTERS
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git")
            && id.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name));
        match good {
            true => Ok(Self { kind, id: id.to_owned() }),
            false => Err(Error::from(Cause::Name {
                what: "repository",
                expected: "`owner/name` of at most 96 letters, digits, `-`, `_` and `.`, without `--`, `..` or `.git` at the end",
                got: id.to_owned(),
            })),
        }
    }

    pub fn model(id: &str) -> Result<Self> {
        Self::new(Kind::Model, id)
    }

    pub fn dataset(id: &str) -> Result<Self> {
        Self::new(Kind::Dataset, id)
    }

    /// `owner/name`
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The repository's address below the endpoint.
    pub(crate) fn path(&self) -> String {
        match self.kind {
            Kind::Model => self.id.clone(),
            Kind::Dataset => format!("datasets/{}", self.id),
        }
    }

    /// The address of what is known of it, below the endpoint.
    pub(crate) fn api(&self) -> String {
        match self.kind {
            Kind::Model => format!("api/models/{}", self.id),
            Kind::Dataset => format!("api/datasets/{}", self.id),
        }
    }
}

impl Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// Where a model lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    Folder(PathBuf),
    /// `revision` is a branch, a tag or a commit.
    Hub {
        repo: RepoId,
        revision: String,
    },
}

impl ModelRef {
    /// Reads a folder's path, `owner/name` (revision `main`) or `owner/name:branch`. A folder that exists
    /// wins over a hub name that is spelled the same.
    pub fn parse(text: &str) -> Result<Self> {
        let folder = Path::new(text);
        if folder.is_dir() {
            return Ok(Self::Folder(folder.to_path_buf()));
        }
        let (repo, revision) = text.split_once(':').unwrap_or((text, MAIN));
        match (RepoId::model(repo), revision.contains('/') || !is_revision(revision)) {
            (Ok(repo), false) => Ok(Self::Hub { repo, revision: revision.to_owned() }),
            _ => Err(Error::from(Cause::Name {
                what: "model",
                expected: "an existing folder, `owner/name` or `owner/name:branch`",
                got: text.to_owned(),
            })),
        }
    }
}

/// # Errors
/// Where it could not be a branch, a tag or a commit. A `/` may stand inside, as in `refs/pr/1`.
pub fn check_revision(revision: &str) -> Result<()> {
    match is_revision(revision) {
        true => Ok(()),
        false => Err(Error::from(Cause::Name {
            what: "revision",
            expected: "a branch, a tag or a commit of letters, digits, `.`, `_`, `-` and `/`",
            got: revision.to_owned(),
        })),
    }
}

fn is_revision(text: &str) -> bool {
    text.len() <= MOST_OF_A_REVISION
        && !text.contains("..")
        && text.split('/').all(|part| is_word(part) && !part.starts_with('.') && !part.ends_with(".lock"))
}

/// Whether it is a commit's 40 hexadecimal digits, which never mean anything else.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hex(revision)
}

/// Lower-case hexadecimal digits.
pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

fn is_part(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric() || c == '_';
    is_word(text) && text.starts_with(ends) && text.ends_with(ends)
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Whether a file's name in a repository stays below the folder that it is joined to, on every system: no `..`, no
/// absolute path, drive, device or other stream, and none of the cache's own folders.
pub fn is_file_name(path: &str) -> bool {
    let good = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && !part.chars().any(|c| c.is_control() || matches!(c, '\\' | ':'))
            && !part.eq_ignore_ascii_case(".git")
            // Windows ignores these ends: `.. ` would be `..`.
            && !part.ends_with(['.', ' '])
    };
    path.len() <= 4096 && path.split('/').all(good) && !path.starts_with(".cache/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repo: &str, revision: &str) -> ModelRef {
        ModelRef::Hub { repo: RepoId::model(repo).unwrap(), revision: revision.to_owned() }
    }

    #[test]
    fn a_name_may_carry_a_branch_and_defaults_to_main() {
        assert_eq!(ModelRef::parse("acme/llama-7B").unwrap(), hub("acme/llama-7B", "main"));
        let branch = ModelRef::parse("acme/llama-7B:gptq-4bit-32g-actorder_True").unwrap();
        assert_eq!(branch, hub("acme/llama-7B", "gptq-4bit-32g-actorder_True"));
    }

    #[test]
    fn paths_out_of_the_cache_and_typing_errors_are_refused() {
        let long = format!("a/{}", "b".repeat(95));
        for text in [
            "",
            "llama",
            "a/b/c",
            "../x",
            "a/..",
            "a/b:",
            "a/b:..",
            "a/b:c/d",
            "a/b:c:d",
            "/nowhere/x",
            "a b/c",
            "a/b--c",
            "a/b.git",
            "a/-b",
            "a/b.",
            &long,
        ] {
            let error = ModelRef::parse(text).unwrap_err().to_string();
            assert!(error.contains("owner/name") && error.contains(text), "{text}: {error}");
        }
    }

    #[test]
    fn an_existing_folder_wins_over_a_hub_name() {
        // Tests run in the crate's folder, where `src/cache` is both a folder and a well-formed hub name.
        assert_eq!(ModelRef::parse("src/cache").unwrap(), ModelRef::Folder("src/cache".into()));
        assert_eq!(ModelRef::parse("src/caches").unwrap(), hub("src/caches", "main"));
    }

    #[test]
    fn a_revision_with_a_slash_is_taken_and_one_that_climbs_is_not() {
        assert!(["main", "refs/pr/1", "v1.0", "gptq-4bit-32g-actorder_True"].into_iter().all(is_revision));
        assert!(
            !["", "..", "a/../b", "/a", "a/", "a b", "a?b", ".hidden", "a%2Fb"].into_iter().any(is_revision)
        );
        assert!(is_commit(&"0a".repeat(20)) && !is_commit("main") && !is_commit(&"0A".repeat(20)));
    }

    #[test]
    fn a_file_name_cannot_leave_its_folder_on_any_system() {
        assert!(
            ["config.json", "a/b c/d.safetensors", ".gitattributes", "ü.txt"].into_iter().all(is_file_name)
        );
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "a/.",
            "..\\x",
            "C:\\x",
            "C:x",
            "\\\\host\\share",
            "a/.. /x",
            "a\0b",
            "a\nb",
            "x:stream",
            ".git/hooks/pre-commit",
            "a/.GIT/config",
            ".cache/huggingface/token",
        ] {
            assert!(!is_file_name(name), "{name:?}");
        }
    }
}
