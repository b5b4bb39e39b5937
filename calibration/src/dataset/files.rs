//! Which files make up a data set.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::open::Kind;
use super::{DatasetRoots, DatasetSpec, Split, WikiText2};
use crate::error::{Error, Result};

/// What the hub's library writes beside the data.
const NO_DATA: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// The files of a data set, sorted by name; at least one, all of one kind.
pub(super) fn locate(spec: &DatasetSpec, roots: &DatasetRoots) -> Result<Vec<PathBuf>> {
    match spec {
        DatasetSpec::WikiText2 { variant, split } => wikitext_files(*variant, *split, spec, roots),
        DatasetSpec::Path { path, split } if path.is_dir() => folder_files(path, split.as_deref()),
        DatasetSpec::Path { path, split } if path.is_file() => match split {
            None if Kind::of(path).is_some() => Ok(vec![path.clone()]),
            None => Err(Error::malformed(path.display(), format!("expected {}", Kind::EXPECTED))),
            Some(split) => Err(Error::malformed(
                path.display(),
                format!("a file has no splits, got the split `{split}`"),
            )),
        },
        DatasetSpec::Path { path, .. } => Err(Error::NotFound {
            what: format!("data set `{spec}`"),
            looked_for: format!("{} ({}, or a folder of them)", path.display(), Kind::EXPECTED),
        }),
    }
}

fn wikitext_files(
    variant: WikiText2,
    split: Split,
    spec: &DatasetSpec,
    roots: &DatasetRoots,
) -> Result<Vec<PathBuf>> {
    let prefix = format!("{}-", split.name());
    let shards_in = |data_set: &Path| {
        let folder = data_set.join(variant.configuration());
        let mut files = if folder.is_dir() { text_files(&folder)? } else { Vec::new() };
        files.retain(|file| file_name(file).starts_with(&prefix) && Kind::of(file) == Some(Kind::Parquet));
        Ok::<_, Error>((files, folder.join(format!("{prefix}*.parquet")).display().to_string()))
    };
    let mut looked_for = Vec::new();
    match &roots.datasets {
        Some(root) => match shards_in(&root.join("wikitext"))? {
            (files, _) if !files.is_empty() => return Ok(files),
            (_, place) => looked_for.push(place),
        },
        None => looked_for.push("wikitext/ in the folder GPTQ_DATASETS (not set)".to_owned()),
    }
    if let Some(hub) = &roots.hub {
        let pattern = format!("{}/{prefix}*.parquet", variant.configuration());
        match hub("Salesforce/wikitext", &pattern) {
            Err(problem) => looked_for.push(format!("the hub ({problem})")),
            Ok(folder) => match shards_in(&folder)? {
                (files, _) if !files.is_empty() => return Ok(files),
                (_, place) => looked_for.push(place),
            },
        }
    }
    Err(Error::NotFound { what: format!("data set `{spec}`"), looked_for: looked_for.join("; ") })
}

fn folder_files(folder: &Path, split: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut files = text_files(folder)?;
    let splits: BTreeSet<String> = files.iter().filter_map(|file| split_of(file_name(file))).collect();
    let listed = splits.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    if let Some(split) = split {
        files.retain(|file| file_name(file).starts_with(split));
        if files.is_empty() {
            let problem = format!("no file name starts with `{split}` (splits: {listed})");
            return Err(Error::malformed(folder.display(), problem));
        }
    } else if splits.len() > 1 {
        let problem = format!("several splits ({listed}): choose one as `{}:SPLIT`", folder.display());
        return Err(Error::malformed(folder.display(), problem));
    }

    let kinds: BTreeSet<Kind> = files.iter().filter_map(|file| Kind::of(file)).collect();
    match kinds.len() {
        1 => Ok(files),
        0 => Err(Error::malformed(folder.display(), format!("expected {}, found none", Kind::EXPECTED))),
        _ => Err(Error::malformed(folder.display(), format!("expected files of one kind, got {kinds:?}"))),
    }
}

/// The files of a known kind in a folder, sorted by name.
fn text_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let paths = entries.map_err(Error::io(folder))?.into_iter().map(|entry| entry.path());
    let is_text = |path: &PathBuf| Kind::of(path).is_some() && !NO_DATA.contains(&file_name(path));
    let mut files: Vec<PathBuf> = paths.filter(|path| path.is_file() && is_text(path)).collect();
    files.sort();
    Ok(files)
}

/// The split that a file's name tells: `train-00000-of-00002.parquet` (the hub's shards) or `train.jsonl`.
fn split_of(name: &str) -> Option<String> {
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let (stem, _) = name.rsplit_once('.')?;
    if matches!(stem, "train" | "validation" | "valid" | "val" | "dev" | "test") {
        return Some(stem.to_owned());
    }
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let (rest, of) = stem.rsplit_once("-of-")?;
    let (split, shard) = rest.rsplit_once('-')?;
    (is_number(of) && is_number(shard)).then(|| split.to_owned())
}

/// Empty for a name that is not UTF-8: it belongs to no split.
fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn folder(names: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        folder
    }

    fn names(folder: &TempDir, split: Option<&str>) -> Result<Vec<String>> {
        let files = folder_files(folder.path(), split)?;
        Ok(files.iter().map(|file| file_name(file).to_owned()).collect())
    }

    fn message(folder: &TempDir, split: Option<&str>) -> String {
        names(folder, split).unwrap_err().to_string()
    }

    #[test]
    fn files_without_a_split_are_all_taken_sorted_by_name() {
        assert_eq!(names(&folder(&["b.txt", "a.txt", "c.bin"]), None).unwrap(), ["a.txt", "b.txt"]);
    }

    #[test]
    fn several_splits_are_never_mixed() {
        let shards =
            ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"];
        let folder = folder(&shards);
        let error = message(&folder, None);
        assert!(error.contains("several splits (test, train)"), "{error}");
        assert_eq!(names(&folder, Some("train")).unwrap(), [shards[1], shards[0]]);
        assert_eq!(names(&folder, Some("test")).unwrap(), [shards[2]]);
        let error = message(&folder, Some("dev"));
        assert!(error.contains("`dev` (splits: test, train)"), "{error}");
    }

    #[test]
    fn the_only_split_is_taken() {
        assert_eq!(names(&folder(&["train.jsonl"]), None).unwrap(), ["train.jsonl"]);
    }

    #[test]
    fn what_describes_a_data_set_is_no_part_of_it() {
        let folder = folder(&["train.json.gz", "dataset_infos.json"]);
        assert_eq!(names(&folder, Some("train")).unwrap(), ["train.json.gz"]);
        assert_eq!(names(&folder, None).unwrap(), ["train.json.gz"]);
    }

    #[test]
    fn a_folder_of_several_kinds_or_of_none_is_an_error() {
        let error = message(&folder(&["a.txt", "b.jsonl"]), None);
        assert!(error.contains("one kind"), "{error}");
        let error = message(&folder(&["a.bin"]), None);
        assert!(error.contains("found none"), "{error}");
    }

    #[test]
    fn wikitext_is_taken_from_the_data_sets_folder_before_the_hub() {
        let shard = "test-00000-of-00001.parquet";
        let local = folder(&[&format!("wikitext/wikitext-2-raw-v1/{shard}")]);
        let snapshot = folder(&[
            &format!("wikitext-2-raw-v1/{shard}"),
            "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        ]);
        let path = snapshot.path().to_owned();
        let hub = move |repo: &str, pattern: &str| match (repo, pattern.starts_with("wikitext-2-raw-v1/t")) {
            ("Salesforce/wikitext", true) => Ok(path.clone()),
            _ => Err(format!("{repo}: no {pattern}")),
        };
        let roots = DatasetRoots { datasets: Some(local.path().into()), hub: None }.with_hub(hub);

        let found = |text: &str| locate(&text.parse()?, &roots);
        assert!(found("wikitext2:test").unwrap()[0].starts_with(local.path()));
        assert!(found("wikitext2").unwrap()[0].starts_with(snapshot.path()));
        let error = found("wikitext2-unk:test").unwrap_err().to_string();
        assert!(error.contains("wikitext/wikitext-2-v1/test-*.parquet; "), "{error}");
        assert!(error.contains("the hub (Salesforce/wikitext: no wikitext-2-v1/test-*.parquet)"), "{error}");
    }

    #[test]
    fn a_missing_path_and_a_foreign_file_are_named() {
        let folder = folder(&["a.bin", "a.txt"]);
        let roots = DatasetRoots::default();
        let found = |name: &str| locate(&folder.path().join(name).display().to_string().parse()?, &roots);
        assert_eq!(found("a.txt").unwrap(), [folder.path().join("a.txt")]);
        for (name, expected) in
            [("b.txt", "not found"), ("a.bin", "expected a .parquet"), ("a.txt:test", "no splits")]
        {
            let error = found(name).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
    }
}
