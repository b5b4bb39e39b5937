//! The cache that all hub clients of a machine share, laid out as Python's `huggingface_hub` does:
//!
//! ```text
//! models--owner--name/blobs/<hash>               content
//! models--owner--name/snapshots/<commit>/<path>  links to it
//! models--owner--name/refs/<revision>            one line without an end, a commit
//! models--owner--name/trees/<commit>.json        all files of the commit, here or not
//! .locks/models--owner--name/<hash>.lock         held by the process that fetches a blob
//! ```

pub(crate) mod link;
pub(crate) mod lock;
mod snapshot;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

pub use self::snapshot::Snapshot;
use crate::name::{Kind, RepoId, check_revision, is_commit};
use crate::oid::Oid;
use crate::tree::Tree;

/// The place of one repository in the cache.
#[derive(Clone, Debug)]
pub struct RepoCache {
    /// The whole cache.
    pub root: PathBuf,
    repo: Repo,
}

impl RepoCache {
    pub fn new(root: &Path, repo: &RepoId) -> Self {
        let kind = match repo.kind {
            Kind::Model => RepoType::Model,
            Kind::Dataset => RepoType::Dataset,
        };
        Self { root: root.to_owned(), repo: Repo::new(repo.id().to_owned(), kind) }
    }

    pub fn folder(&self) -> PathBuf {
        self.root.join(self.repo.folder_name())
    }

    pub(crate) fn blob(&self, oid: &Oid) -> PathBuf {
        self.folder().join("blobs").join(oid.as_str())
    }

    pub(crate) fn lock(&self, oid: &Oid) -> PathBuf {
        self.root.join(".locks").join(self.repo.folder_name()).join(format!("{oid}.lock"))
    }

    /// The note of an upload that goes on.
    pub(crate) fn upload(&self, oid: &Oid) -> PathBuf {
        self.lock(oid).with_extension("upload")
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        Cache::new(self.root.clone()).repo(self.repo.clone()).pointer_path(commit)
    }

    fn tree_file(&self, commit: &str) -> PathBuf {
        self.folder().join("trees").join(format!("{commit}.json"))
    }

    /// The commit that a revision named when it was asked for last; a commit names itself. None where that is not
    /// known, or the file says what is no commit.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn commit(&self, revision: &str) -> io::Result<Option<String>> {
        const MOST_BYTES: u64 = 1024;
        if check_revision(revision).is_err() {
            return Ok(None);
        }
        match gptq_input::read(&self.folder().join("refs").join(revision), MOST_BYTES) {
            Ok(commit) => {
                let commit = String::from_utf8_lossy(&commit).trim().to_owned();
                Ok((check_revision(&commit).is_ok() && !commit.contains('/')).then_some(commit))
            }
            Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                let is_named = !revision.contains('/') && self.snapshot(revision).is_dir();
                Ok((is_commit(revision) || is_named).then(|| revision.to_owned()))
            }
            Err(cause) => Err(cause),
        }
    }

    /// Says which commit a revision names, without a moment in which the file is empty. Comes last.
    pub(crate) fn write_ref(&self, revision: &str, commit: &str) -> io::Result<()> {
        match revision == commit {
            true => Ok(()),
            false => replace(&self.folder().join("refs").join(revision), commit.as_bytes()),
        }
    }

    /// None where none is kept, or what is kept cannot be read.
    pub fn tree(&self, commit: &str) -> Option<Tree> {
        const MOST_BYTES: u64 = 256 << 20;
        Tree::from_kept(&gptq_input::read(&self.tree_file(commit), MOST_BYTES).ok()?)
    }

    pub(crate) fn write_tree(&self, commit: &str, tree: &Tree) -> io::Result<()> {
        replace(&self.tree_file(commit), &tree.to_kept())
    }
}

/// Writes a file beside its place and moves it there.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let beside = beside(path);
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// A name that no other process uses, in the same folder.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.gptq.tmp", eight_hex()))
}

/// Eight hexadecimal digits, other ones each time.
pub(crate) fn eight_hex() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:08x}", RandomState::new().hash_one(std::process::id()) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path) -> RepoCache {
        RepoCache::new(folder, &RepoId::model("acme/tiny").unwrap())
    }

    #[test]
    fn the_layout_is_pythons() {
        let cache = cache(Path::new("/c"));
        let oid = Oid::parse(&"0a".repeat(32)).unwrap();
        assert_eq!(cache.blob(&oid), Path::new("/c/models--acme--tiny/blobs").join(oid.as_str()));
        assert_eq!(cache.lock(&oid), Path::new("/c/.locks/models--acme--tiny").join(format!("{oid}.lock")));
        assert_eq!(cache.snapshot("c0"), Path::new("/c/models--acme--tiny/snapshots/c0"));
        let data = RepoCache::new(Path::new("/c"), &RepoId::dataset("Salesforce/wikitext").unwrap());
        assert_eq!(data.folder(), Path::new("/c/datasets--Salesforce--wikitext"));
    }

    #[test]
    fn a_revision_is_found_through_its_ref_or_by_its_commit_and_never_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        let commit = "0a".repeat(20);
        cache.write_ref("refs/pr/1", &commit).unwrap();
        assert_eq!(fs::read(cache.folder().join("refs/refs/pr/1")).unwrap(), commit.as_bytes());
        let found = |revision: &str| cache.commit(revision).unwrap();
        assert_eq!(found("refs/pr/1"), Some(commit.clone()));
        assert_eq!(found(&commit), Some(commit.clone()));
        assert_eq!(found("dev"), None);
        for bad in ["../../..", "", "a/b"] {
            replace(&cache.folder().join("refs/main"), bad.as_bytes()).unwrap();
            assert_eq!(found("main"), None, "{bad}");
        }
        assert_eq!(found("../main"), None);
        // Others end the line.
        replace(&cache.folder().join("refs/main"), format!("{commit}\n").as_bytes()).unwrap();
        assert_eq!(found("main"), Some(commit));
    }
}
