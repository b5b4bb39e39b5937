//! Models and data sets by name: a folder, or a snapshot in the local hub cache.
//!
//! The cache is laid out as Python's `huggingface_hub` does, so both share one copy of the files:
//!
//! ```text
//! models--owner--name/refs/<revision>       one line, a commit
//! models--owner--name/snapshots/<commit>/   the files of that commit
//! datasets--owner--name/...                 the same for data sets
//! ```

use std::env;
use std::ffi::OsString;
use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const DEFAULT_REVISION: &str = "main";

/// Where a model lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    Folder(PathBuf),
    /// `repo` is `owner/name`; `revision` a branch, a tag or a commit.
    Hub {
        repo: String,
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
        let (repo, revision) = text.split_once(':').unwrap_or((text, DEFAULT_REVISION));
        if is_repo(repo) && is_revision(revision) {
            return Ok(Self::Hub { repo: repo.to_owned(), revision: revision.to_owned() });
        }
        Err(Error::Parse {
            what: "model",
            expected: "an existing folder, `owner/name` or `owner/name:branch`",
            got: text.to_owned(),
        })
    }

    /// The folder that holds the model's files. Fails when the hub cache lacks the repository or its
    /// revision.
    pub fn resolve(&self, cache: &HubCache) -> Result<PathBuf> {
        match self {
            Self::Folder(folder) => Ok(folder.clone()),
            Self::Hub { repo, revision } => cache.snapshot("models", repo, revision),
        }
    }
}

impl Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "{}", folder.display()),
            Self::Hub { repo, revision } if revision == DEFAULT_REVISION => f.write_str(repo),
            Self::Hub { repo, revision } => write!(f, "{repo}:{revision}"),
        }
    }
}

/// The local hub cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubCache {
    pub root: PathBuf,
}

impl HubCache {
    /// The cache that `huggingface_hub` would use in this environment: `HF_HUB_CACHE`, else `HF_HOME/hub`,
    /// else
    /// `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`. It need not exist yet.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| env::var_os(name))
    }

    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let folder = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = folder("HF_HUB_CACHE")
            .or_else(|| Some(folder("HF_HOME")?.join("hub")))
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface/hub")))
            .or_else(|| Some(folder("HOME")?.join(".cache/huggingface/hub")))
            .ok_or(Error::NoHome)?;
        Ok(Self { root })
    }

    /// The snapshot of the data set `owner/name` at revision `main`.
    pub fn dataset_snapshot(&self, repo: &str) -> Result<PathBuf> {
        self.snapshot("datasets", repo, DEFAULT_REVISION)
    }

    fn snapshot(&self, kind: &str, repo: &str, revision: &str) -> Result<PathBuf> {
        let repo_folder = self.root.join(format!("{kind}--{}", repo.replace('/', "--")));
        let snapshots = repo_folder.join("snapshots");
        let not_found = |path: &Path| Error::NotFound {
            what: format!("{repo}:{revision}"),
            looked_for: path.display().to_string(),
        };
        let ref_file = repo_folder.join("refs").join(revision);
        /// A commit has 40.
        const MOST_BYTES: u64 = 1024;
        let commit = match gptq_input::read(&ref_file, MOST_BYTES) {
            Ok(commit) => String::from_utf8_lossy(&commit).trim().to_owned(),
            // A commit has no ref file: it names its snapshot itself.
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                let snapshot = snapshots.join(revision);
                return if snapshot.is_dir() { Ok(snapshot) } else { Err(not_found(&ref_file)) };
            }
            Err(cause) => return Err(Error::io(&ref_file)(cause)),
        };
        if !is_revision(&commit) {
            return Err(Error::malformed(
                ref_file.display(),
                format!("expected a commit, got `{}`", gptq_input::short(&commit)),
            ));
        }
        let snapshot = snapshots.join(commit);
        if snapshot.is_dir() { Ok(snapshot) } else { Err(not_found(&snapshot)) }
    }
}

fn is_repo(text: &str) -> bool {
    let is_part =
        |part: &str| is_word(part) && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    text.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// Names become path components: `.` and `..` would leave the cache.
fn is_revision(text: &str) -> bool {
    is_word(text) && text != "." && text != ".."
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hub(repo: &str, revision: &str) -> ModelRef {
        ModelRef::Hub { repo: repo.to_owned(), revision: revision.to_owned() }
    }

    #[test]
    fn a_name_may_carry_a_branch_and_defaults_to_main() {
        assert_eq!(ModelRef::parse("acme/llama-7B").unwrap(), hub("acme/llama-7B", "main"));
        let branch = ModelRef::parse("acme/llama-7B:gptq-4bit-32g-actorder_True").unwrap();
        assert_eq!(branch, hub("acme/llama-7B", "gptq-4bit-32g-actorder_True"));
        assert_eq!(branch.to_string(), "acme/llama-7B:gptq-4bit-32g-actorder_True");
    }

    #[test]
    fn paths_out_of_the_cache_and_typing_errors_are_refused() {
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
        ] {
            let error = ModelRef::parse(text).unwrap_err().to_string();
            assert!(error.contains("owner/name") && error.contains(text), "{text}: {error}");
        }
    }

    #[test]
    fn an_existing_folder_wins_over_a_hub_name() {
        // Tests run in the crate's folder, where `src/dataset` is both a folder and a well-formed hub name.
        assert_eq!(ModelRef::parse("src/dataset").unwrap(), ModelRef::Folder("src/dataset".into()));
        assert_eq!(ModelRef::parse("src/datasets").unwrap(), hub("src/datasets", "main"));
    }

    #[test]
    fn the_cache_follows_the_variables_of_the_python_library_in_their_order() {
        let vars = [("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/d")];
        let expected = ["/a", "/b/hub", "/c/huggingface/hub", "/d/.cache/huggingface/hub"];
        for (first, expected) in expected.iter().enumerate() {
            let set = &vars[first..];
            let cache = HubCache::from_vars(|name| {
                // An empty variable counts as unset.
                let value = set.iter().find(|var| var.0 == name).map_or("", |var| var.1);
                Some(value.into())
            });
            assert_eq!(cache.unwrap().root, Path::new(expected));
        }
        assert!(matches!(HubCache::from_vars(|_| None), Err(Error::NoHome)));
    }

    #[test]
    fn a_snapshot_is_found_through_its_ref_or_by_its_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = HubCache { root: folder.path().to_path_buf() };
        let repo = folder.path().join("models--acme--tiny");
        let snapshot = repo.join("snapshots/0a1b2c");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::write(repo.join("refs/main"), "0a1b2c\n").unwrap();
        for text in ["acme/tiny", "acme/tiny:0a1b2c"] {
            assert_eq!(ModelRef::parse(text).unwrap().resolve(&cache).unwrap(), snapshot);
        }

        let missing = ModelRef::parse("acme/tiny:dev").unwrap().resolve(&cache).unwrap_err().to_string();
        assert!(missing.starts_with("acme/tiny:dev not found"), "{missing}");
        assert!(missing.ends_with("models--acme--tiny/refs/dev"), "{missing}");

        // A snapshot that was deleted, and a ref that points out of the cache.
        fs::write(repo.join("refs/main"), "ffffff").unwrap();
        assert!(matches!(hub("acme/tiny", "main").resolve(&cache), Err(Error::NotFound { .. })));
        fs::write(repo.join("refs/main"), "../../..").unwrap();
        assert!(matches!(hub("acme/tiny", "main").resolve(&cache), Err(Error::Malformed { .. })));
    }

    #[test]
    fn data_sets_have_their_own_prefix() {
        let folder = tempfile::tempdir().unwrap();
        let repo = folder.path().join("datasets--Salesforce--wikitext");
        fs::create_dir_all(repo.join("snapshots/b0")).unwrap();
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::write(repo.join("refs/main"), "b0").unwrap();
        let cache = HubCache { root: folder.path().to_path_buf() };
        assert_eq!(cache.dataset_snapshot("Salesforce/wikitext").unwrap(), repo.join("snapshots/b0"));
    }
}
