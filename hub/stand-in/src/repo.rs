//! Repositories: branches, commits, files.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

pub type Files = BTreeMap<String, File>;

#[derive(Clone, Debug)]
pub struct File {
    pub bytes: Bytes,
    /// Known by its sha256, and sent by the storage.
    pub large: bool,
    /// Git's sha1 of a small file, sha256 of a large one.
    pub oid: String,
}

#[derive(Clone, Debug)]
pub struct Repo {
    pub private: bool,
    pub gated: bool,
    /// Requests for it are redirected there, within the hub.
    pub moved_to: Option<String>,
    pub branches: BTreeMap<String, String>,
    pub commits: HashMap<String, Files>,
    /// Of each commit that is not the first.
    pub parents: HashMap<String, String>,
    /// Commits until now.
    pub made: usize,
}

impl File {
    pub fn new(bytes: Bytes, large: bool) -> Self {
        let oid = if large { sha256(&bytes) } else { git_oid(&bytes) };
        Self { bytes, large, oid }
    }
}

impl Repo {
    /// With an empty commit on `main`, as the hub makes one.
    pub fn new() -> Self {
        let mut repo = Self {
            private: false,
            gated: false,
            moved_to: None,
            branches: BTreeMap::new(),
            commits: HashMap::new(),
            parents: HashMap::new(),
            made: 0,
        };
        let attributes =
            File::new(Bytes::from_static(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"), false);
        repo.commit("main", Files::from([(".gitattributes".into(), attributes)]));
        repo
    }

    /// Puts these files on a branch, in place of all that were there.
    pub fn commit(&mut self, branch: &str, files: Files) -> String {
        self.made += 1;
        let mut text = format!("{branch} {}", self.made);
        files.iter().for_each(|(path, file)| text += &format!(" {path} {}", file.oid));
        let commit = git_oid(text.as_bytes());
        self.commits.insert(commit.clone(), files);
        if let Some(parent) = self.branches.insert(branch.to_owned(), commit.clone()) {
            self.parents.insert(commit.clone(), parent);
        }
        commit
    }

    /// The commit that a revision names.
    pub fn find(&self, revision: &str) -> Option<&str> {
        let commit = self.branches.get(revision).map_or(revision, String::as_str);
        self.commits
            .contains_key(commit)
            .then(|| self.commits.get_key_value(commit).map(|(key, _)| key.as_str()))?
    }
}

impl Default for Repo {
    fn default() -> Self {
        Self::new()
    }
}

/// sha1 over `blob LENGTH\0` and the content.
pub fn git_oid(bytes: &[u8]) -> String {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
