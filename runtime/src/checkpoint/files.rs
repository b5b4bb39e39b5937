//! Which safetensors files of a folder are its model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_input::{Distinct, short, short_line};
use serde::Deserialize;

use crate::{Error, Result};

/// Bytes of an index at most. An entry has some 110: the 180,000 tensors of a quantized DeepSeek-V3 come to 20 MB, the
/// 3,500 of Llama 405B to 0.4.
const MOST_BYTES: u64 = 32 << 20;

pub(super) struct Found {
    pub paths: Vec<PathBuf>,
    /// Tensor name to file, where there is an index.
    pub index: BTreeMap<String, Arc<Path>>,
}

/// The file or index under one of `names`, which an artifact's description gives; else `model.safetensors`, else
/// `model.safetensors.index.json`, else the only index or the only safetensors file under another name.
pub(super) fn find(dir: &Path, names: &[String]) -> Result<Found> {
    let one = |path| Found { paths: vec![path], index: BTreeMap::new() };
    for name in names.iter().map(String::as_str).chain(["model"]) {
        let (single, index) =
            (dir.join(format!("{name}.safetensors")), dir.join(format!("{name}.safetensors.index.json")));
        if single.exists() {
            return Ok(one(single));
        }
        if index.exists() {
            return sharded(dir, &index);
        }
    }
    let (files, indices) = (ending(dir, ".safetensors")?, ending(dir, ".safetensors.index.json")?);
    match (&files[..], &indices[..]) {
        (_, [index]) => sharded(dir, index),
        ([file], []) => Ok(one(file.clone())),
        ([], []) => Err(Error::File { path: dir.into(), problem: other_formats(dir)? }),
        _ => {
            let (files, indices) = (files.len(), indices.len());
            let problem = format!(
                "expected model.safetensors, an index, or one *.safetensors file, got {files} files and {indices} indices"
            );
            Err(Error::File { path: dir.into(), problem })
        }
    }
}

/// What to do about a folder without safetensors files.
fn other_formats(dir: &Path) -> Result<String> {
    let pickled = |end: &str| Ok::<_, Error>(!ending(dir, end)?.is_empty());
    Ok(if pickled(".bin")? || pickled(".pt")? || pickled(".pth")? {
        "expected safetensors files, got pickled weights only (.bin, .pt), which this program does not read; convert them \
         once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) in transformers"
            .into()
    } else if pickled(".gguf")? {
        "expected safetensors files, got GGUF, which this program does not read".into()
    } else {
        "expected model.safetensors, an index, or one *.safetensors file, got none".into()
    })
}

fn ending(dir: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        // Names that start with a dot are unfinished files of a writer.
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.ends_with(end) && !name.starts_with('.')) {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn sharded(dir: &Path, path: &Path) -> Result<Found> {
    /// What an index says; the rest is not kept.
    #[derive(Deserialize)]
    struct Index {
        weight_map: Distinct<String>,
    }

    let bytes = gptq_input::read(path, MOST_BYTES).map_err(Error::io(path))?;
    let refused = |problem: String| Error::File { path: path.into(), problem };
    let Index { weight_map: Distinct(map) } = serde_json::from_slice(&bytes).map_err(|cause| {
        refused(format!("expected a weight_map of file names, got {}", short_line(&cause.to_string())))
    })?;
    drop(bytes);
    // Tensors of one file share its path.
    let mut paths = BTreeSet::<Arc<Path>>::new();
    let mut index = BTreeMap::new();
    for (tensor, name) in map {
        if name.contains(['/', '\\', '\0']) || !name.ends_with(".safetensors") {
            let (tensor, name) = (short(&tensor), short(&format!("{name:?}")));
            return Err(refused(format!(
                "weight_map: {tensor}: expected a safetensors file in this folder, got {name}"
            )));
        }
        let path = dir.join(name);
        let path = match paths.get(path.as_path()) {
            Some(path) => path.clone(),
            None => Arc::from(path),
        };
        paths.insert(path.clone());
        index.insert(tensor, path);
    }
    let Some(first) = paths.first().cloned() else {
        return Err(refused("weight_map: expected an object of file names, got none".into()));
    };
    // An entry may be left from another time: a file that is not there matters only if a tensor of it is needed.
    paths.retain(|path| path.exists());
    if paths.is_empty() {
        return Err(Error::io(&first)(std::io::ErrorKind::NotFound.into()));
    }
    Ok(Found { paths: paths.iter().map(|path| path.to_path_buf()).collect(), index })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn shards_are_joined_and_a_wrong_index_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
        let index =
            |a: &str| write("x.safetensors.index.json", format!(r#"{{"weight_map":{a}}}"#).as_bytes());
        let refusal =
            || Checkpoint::open(dir.path()).err().map_or("accepted".into(), |error| error.to_string());
        let entry = r#"{"dtype":"I32","shape":[1],"data_offsets":[0,4]}"#;
        write("x-1.safetensors", &file(&format!(r#"{{"a":{entry}}}"#), &[1, 0, 0, 0]));
        write("x-2.safetensors", &file(&format!(r#"{{"b":{entry}}}"#), &[2, 0, 0, 0]));
        assert!(refusal().contains("got 2 files and 0 indices"));
        index(r#"{"a":"x-1.safetensors","b":"x-2.safetensors"}"#);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.ints("b", &[1]).unwrap(), [2]);
        assert_eq!(checkpoint.file_sizes().len(), 2);
        // What an index names too much does not matter until it is asked for.
        index(r#"{"a":"x-1.safetensors","c":"x-2.safetensors"}"#);
        let missing =
            |name: &str| Checkpoint::open(dir.path()).unwrap().ints(name, &[1]).unwrap_err().to_string();
        assert!(missing("c").ends_with("x-2.safetensors: tensor c is missing"));
        index(r#"{"a":"x-1.safetensors","b":"x-3.safetensors"}"#);
        assert!(missing("b").ends_with("x-3.safetensors: tensor b is missing"));
        index(r#"{"b":"x-3.safetensors"}"#);
        assert!(refusal().contains("x-3.safetensors: "));
        index(r#"{"a":"../x-1.safetensors"}"#);
        assert!(
            refusal().ends_with("expected a safetensors file in this folder, got \"../x-1.safetensors\"")
        );
        let both = format!(r#"{{"a":{entry},"b":{{"dtype":"I32","shape":[1],"data_offsets":[4,8]}}}}"#);
        write("x-2.safetensors", &file(&both, &[3, 0, 0, 0, 2, 0, 0, 0]));
        for (named, value) in [("x-1", 1), ("x-2", 3)] {
            index(&format!(r#"{{"a":"{named}.safetensors","b":"x-2.safetensors","c":"x-1.safetensors"}}"#));
            assert_eq!(
                Checkpoint::open(dir.path()).unwrap().ints("a", &[1]).unwrap(),
                [value],
                "the index decides"
            );
        }
        index(r#"{"b":"x-2.safetensors","c":"x-1.safetensors"}"#);
        assert!(refusal().contains("a: expected in one file only"));
    }

    #[test]
    fn the_only_safetensors_file_is_found_whatever_its_name() {
        let header =
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}"#;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("gptq_model-4bit-128g.safetensors"), file(header, &[0; 8])).unwrap();
        fs::write(dir.path().join(".half.safetensors"), b"").unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.metadata()["format"], "pt");
        assert_eq!(checkpoint.ints("a", &[2]).unwrap(), [0, 0]);
    }

    #[test]
    fn of_several_files_the_one_that_the_description_names_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: u8| {
            let header = r#"{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#;
            fs::write(dir.path().join(name), file(header, &[value, 0, 0, 0])).unwrap();
        };
        let describe = |json: &str| fs::write(dir.path().join("quantize_config.json"), json).unwrap();
        let read = || Checkpoint::open(dir.path()).unwrap().ints("a", &[1]).unwrap()[0];
        write("x.no-act.order.safetensors", 1);
        write("y.act.order.safetensors", 2);
        write("gptq_model-4bit-128g.safetensors", 3);
        write("model.safetensors", 4);
        describe(r#"{"bits": 4, "group_size": 128, "model_file_base_name": "x.no-act.order"}"#);
        assert_eq!(read(), 1);
        describe(r#"{"bits": 4, "group_size": 128}"#);
        assert_eq!(read(), 3);
        describe(r#"{"bits": 8, "group_size": 128, "model_file_base_name": "absent"}"#);
        assert_eq!(read(), 4);
    }

    #[test]
    fn a_folder_without_safetensors_says_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = || Checkpoint::open(dir.path()).err().unwrap().to_string();
        assert!(refusal().ends_with("got none"));
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(refusal().contains("pickled") && refusal().contains("save_pretrained"));
    }
}
