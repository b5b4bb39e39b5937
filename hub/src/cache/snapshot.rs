//! Whether what lies in the cache is all that is wanted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::RepoCache;
use crate::select::Wanted;

/// The files of a commit, all that were wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub commit: String,
    pub folder: PathBuf,
}

impl RepoCache {
    /// The snapshot of a revision, or what of it is missing. Other clients write the ref before the files, and leave
    /// parts behind where they are interrupted: a folder alone says nothing.
    pub fn complete(&self, revision: &str, wanted: &Wanted) -> io::Result<Result<Snapshot, String>> {
        let Some(commit) = self.commit(revision)? else {
            return Ok(Err(format!("revision {revision}")));
        };
        let folder = self.snapshot(&commit);
        if !folder.is_dir() {
            return Ok(Err(format!("snapshot {commit}")));
        }
        let missing = match self.tree(&commit) {
            Some(tree) => match wanted.of(&tree) {
                Ok(entries) => {
                    entries.into_iter().find(|entry| !is_there(&folder.join(&entry.path), Some(entry.size)))
                }
                Err((file, cause)) => return Ok(Err(file.unwrap_or_else(|| cause.to_string()))),
            }
            .map(|entry| entry.path.clone()),
            None => missing_without_tree(&folder, wanted)?,
        };
        Ok(match missing {
            Some(file) => Err(file),
            None => Ok(Snapshot { commit, folder }),
        })
    }
}

/// Whether a file is there, through its link, with this size where one is known.
pub(crate) fn is_there(path: &Path, size: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

/// What an older client's folder shows by itself: links that lead nowhere, and shards that the index names.
fn missing_without_tree(folder: &Path, wanted: &Wanted) -> io::Result<Option<String>> {
    let named = match wanted {
        Wanted::Files(names) => names.clone(),
        _ => files_below(folder, "")?,
    };
    let absent = |names: Vec<String>| names.into_iter().find(|name| !is_there(&folder.join(name), None));
    if let Some(name) = absent(named) {
        return Ok(Some(name));
    }
    if *wanted != Wanted::Model {
        return Ok(None);
    }
    if !is_there(&folder.join("config.json"), None) {
        return Ok(Some("config.json".into()));
    }
    let index = folder.join("model.safetensors.index.json");
    if is_there(&index, None) {
        return Ok(absent(shards(&index)));
    }
    let has_weights = files_below(folder, "")?.iter().any(|name| name.ends_with(".safetensors"));
    Ok((!has_weights).then(|| "model.safetensors".to_owned()))
}

/// The files that an index names.
fn shards(index: &Path) -> Vec<String> {
    const MOST_BYTES: u64 = 64 << 20;
    let text = gptq_input::read(index, MOST_BYTES).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let map = value.get("weight_map").and_then(|map| map.as_object());
    let mut names: Vec<_> = map
        .into_iter()
        .flat_map(|map| map.values())
        .filter_map(|name| name.as_str())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Links count as files, wherever they lead.
fn files_below(folder: &Path, prefix: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type()?.is_dir() {
            true => names.extend(files_below(&entry.path(), &format!("{name}/"))?),
            false => names.push(name),
        }
    }
    Ok(names)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::name::RepoId;

    #[test]
    fn a_part_of_a_snapshot_does_not_pass_as_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), &RepoId::model("acme/tiny").unwrap());
        let commit = "0a".repeat(20);
        let missing = |wanted: &Wanted| match cache.complete("main", wanted).unwrap() {
            Ok(snapshot) => {
                assert_eq!(snapshot.folder, cache.snapshot(&commit));
                None
            }
            Err(what) => Some(what),
        };
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("revision main"));
        cache.write_ref("main", &commit).unwrap();
        assert_eq!(missing(&Wanted::Model), Some(format!("snapshot {commit}")));

        // Without a tree: what the folder shows.
        let (snapshot, blobs) = (cache.snapshot(&commit), cache.folder().join("blobs"));
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("config.json"));
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(missing(&Wanted::Files(vec!["config.json".into()])), None);
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("model.safetensors"));
        let index = r#"{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}"#;
        fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
        fs::write(snapshot.join("model-1.safetensors"), "1").unwrap();
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("model-2.safetensors"));
        symlink("../../blobs/two", snapshot.join("model-2.safetensors")).unwrap();
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("model-2.safetensors"));
        fs::write(blobs.join("two"), "2").unwrap();
        assert_eq!(missing(&Wanted::Model), None);

        // With a tree: what was listed, with its size.
        let blob = "0".repeat(40);
        let kept = format!(
            r#"{{"format_version": 1, "files": {{"config.json": {{"size": 2, "blob_id": "{blob}"}}, "a.txt": {{"size": 1, "blob_id": "{blob}"}}}}}}"#
        );
        crate::cache::replace(&cache.folder().join(format!("trees/{commit}.json")), kept.as_bytes()).unwrap();
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("a.txt"));
        fs::write(snapshot.join("a.txt"), "22").unwrap();
        assert_eq!(missing(&Wanted::Model).as_deref(), Some("a.txt"));
        fs::write(snapshot.join("a.txt"), "2").unwrap();
        assert_eq!(missing(&Wanted::Model), None);
    }
}
