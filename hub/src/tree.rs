//! What a repository holds: commits, branches and the files of a commit.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::address::{next_page, quote};
use crate::client::{Client, header};
use crate::error::{Cause, Result, Subject};
use crate::name::{RepoId, is_commit, is_file_name};
use crate::oid::Oid;
use crate::progress::Watch;

/// A file of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Checked: it stays below the folder that it is joined to.
    pub path: String,
    pub size: u64,
    /// By which the content is verified, and the name of its blob: sha256 for large files, git's sha1 for others.
    pub oid: Oid,
    /// As the hub and Python's cache have it.
    record: Record,
}

/// A file in `trees/<commit>.json`, as Python writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

/// All files of a commit, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    format_version: u32,
    files: BTreeMap<String, Record>,
}

const FORMAT_VERSION: u32 = 1;

impl Entry {
    fn new(path: String, record: Record) -> Result<Self, Cause> {
        if !is_file_name(&path) {
            return Err(Cause::UnsafeName { name: path });
        }
        let oid = record.lfs_sha256.as_ref().unwrap_or(&record.blob_id);
        let Some(oid) = Oid::parse(oid) else {
            let problem = format!("{path}: expected a hash, got `{}`", gptq_input::short(oid));
            return Err(Cause::Malformed { endpoint: String::new(), problem });
        };
        Ok(Self { size: record.lfs_size.unwrap_or(record.size), path, oid, record })
    }

    /// Whether it lies in the storage for large files.
    pub fn is_large(&self) -> bool {
        self.record.lfs_sha256.is_some()
    }
}

impl Tree {
    fn new(files: impl IntoIterator<Item = (String, Record)>) -> Result<Self, Cause> {
        let mut entries = BTreeMap::new();
        for (path, record) in files {
            entries.insert(path.clone(), Entry::new(path, record)?);
        }
        // One name that is a folder for another could not be written.
        let is_folder = |path: &str| {
            let above = path.match_indices('/').map(|(at, _)| &path[..at]);
            above.into_iter().any(|folder| entries.contains_key(folder))
        };
        match entries.keys().find(|path| is_folder(path)) {
            Some(path) => Err(Cause::UnsafeName { name: path.clone() }),
            None => Ok(Self { entries }),
        }
    }

    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub fn paths(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    /// From what a cache has kept. None for what is damaged, of another version, or says what it must not.
    pub(crate) fn from_kept(bytes: &[u8]) -> Option<Self> {
        let kept: Kept = serde_json::from_slice(bytes).ok()?;
        (kept.format_version == FORMAT_VERSION).then(|| Self::new(kept.files).ok()).flatten()
    }

    /// For a cache, as Python's is: one blank a level.
    pub(crate) fn to_kept(&self) -> Vec<u8> {
        let files = self.entries.iter().map(|(path, entry)| (path.clone(), entry.record.clone())).collect();
        let mut bytes = Vec::new();
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
        // Texts and numbers can always be written to memory.
        match (Kept { format_version: FORMAT_VERSION, files }).serialize(&mut serializer) {
            Ok(()) => bytes,
            Err(_) => Vec::new(),
        }
    }
}

/// An element of the hub's answer.
#[derive(Deserialize)]
struct Listed {
    r#type: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Lfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
}

#[derive(Deserialize)]
struct Refs {
    branches: Vec<Branch>,
}

/// A branch and its head.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Branch {
    pub name: String,
    #[serde(rename = "targetCommit")]
    pub commit: String,
}

impl Client {
    /// The commit that a revision names now.
    pub fn commit(&self, repo: &RepoId, revision: &str, watch: &Watch) -> Result<String> {
        let subject = Subject::revision(repo, revision);
        let url = self.url(&format!("{}/revision/{}", repo.api(), quote(revision, "")));
        let info = self.get::<Info>(&url, &subject, watch);
        let (info, _) = match info {
            Err(mut error) => {
                if let Cause::NoRevision { branches } = &mut *error.cause {
                    let known = self.branches(repo, watch).unwrap_or_default();
                    *branches = known.into_iter().map(|branch| branch.name).collect();
                }
                return Err(error);
            }
            Ok(info) => info,
        };
        match is_commit(&info.sha) {
            true => Ok(info.sha),
            false => Err(subject.fails(self.malformed(format!("expected a commit, got `{}`", info.sha)))),
        }
    }

    pub fn branches(&self, repo: &RepoId, watch: &Watch) -> Result<Vec<Branch>> {
        let url = self.url(&format!("{}/refs", repo.api()));
        Ok(self.get::<Refs>(&url, &Subject::repo(repo), watch)?.0.branches)
    }

    /// All files of a commit.
    ///
    /// # Errors
    /// Also where a name would leave the folder that it is joined to.
    pub fn tree(&self, repo: &RepoId, commit: &str, watch: &Watch) -> Result<Tree> {
        let subject = Subject::revision(repo, commit);
        let mut url =
            self.url(&format!("{}/tree/{}?recursive=true&expand=false", repo.api(), quote(commit, "")));
        let (mut files, mut seen) = (Vec::new(), HashSet::new());
        while seen.insert(url.clone()) {
            let (page, headers) = self.get::<Vec<Listed>>(&url, &subject, watch)?;
            files.extend(page.into_iter().filter(|listed| listed.r#type == "file").map(Listed::into_file));
            let Some(next) = header(&headers, "link").and_then(next_page) else { break };
            url = match crate::address::follow(&url, next) {
                Some(next) if self.trusts(&next) => next,
                _ => return Err(subject.fails(self.no_hub("the next page of its files lies elsewhere"))),
            };
        }
        Tree::new(files).map_err(|cause| match cause {
            Cause::Malformed { problem, .. } => subject.fails(self.malformed(problem)),
            cause => subject.fails(cause),
        })
    }
}

impl Listed {
    fn into_file(self) -> (String, Record) {
        let is_hash = |hash: &String| hash.len() == 64 && crate::name::is_hex(hash);
        let record = Record {
            size: self.size,
            blob_id: self.oid,
            lfs_size: self.lfs.as_ref().map(|lfs| lfs.size),
            lfs_sha256: self.lfs.map(|lfs| lfs.oid),
            xet_hash: self.xet_hash.filter(is_hash),
        };
        (self.path, record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sha256: Option<&str>) -> Record {
        let lfs_sha256 = sha256.map(str::to_owned);
        Record {
            size: 3,
            blob_id: "0a".repeat(20),
            lfs_size: lfs_sha256.as_ref().map(|_| 7),
            lfs_sha256,
            xet_hash: None,
        }
    }

    #[test]
    fn a_tree_is_kept_as_python_keeps_it() {
        let sha = "0b".repeat(32);
        let tree =
            Tree::new([("b/x.bin".to_owned(), record(Some(&sha))), ("a".to_owned(), record(None))]).unwrap();
        let kept = String::from_utf8(tree.to_kept()).unwrap();
        // json.dump(data, f, indent=1) of the same dictionary.
        let blob = "0a".repeat(20);
        let python = format!(
            "{{\n \"format_version\": 1,\n \"files\": {{\n  \"a\": {{\n   \"size\": 3,\n   \"blob_id\": \"{blob}\"\n  }},\n  \
             \"b/x.bin\": {{\n   \"size\": 3,\n   \"blob_id\": \"{blob}\",\n   \"lfs_sha256\": \"{sha}\",\n   \"lfs_size\": 7\n  }}\n }}\n}}"
        );
        assert_eq!(kept, python);
        assert_eq!(Tree::from_kept(kept.as_bytes()).unwrap(), tree);
        assert_eq!(
            tree.get("b/x.bin").map(|entry| (entry.size, entry.oid.as_str())),
            Some((7, sha.as_str()))
        );
    }

    #[test]
    fn names_that_climb_or_collide_are_refused_from_the_hub_and_from_a_cache() {
        let climbs = [("../x".to_owned(), record(None))];
        assert!(matches!(Tree::new(climbs), Err(Cause::UnsafeName { .. })));
        let collides = ["a", "a/b"].map(|path| (path.to_owned(), record(None)));
        assert!(matches!(Tree::new(collides), Err(Cause::UnsafeName { .. })));
        let kept = r#"{"format_version": 1, "files": {"/etc/x": {"size": 1, "blob_id": "00"}}}"#;
        assert_eq!(Tree::from_kept(kept.as_bytes()), None);
        assert_eq!(Tree::from_kept(br#"{"format_version": 2, "files": {}}"#), None);
    }
}
