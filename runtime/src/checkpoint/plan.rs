//! A safetensors file before it is written: its header, every offset and its size.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::layout::TensorSpec;
use crate::{Error, Result};

/// Where everything of one safetensors file lies.
#[derive(Clone, Debug)]
pub struct FilePlan {
    /// What the file starts with: the length and the JSON, padded to a multiple of eight bytes.
    pub header: Vec<u8>,
    /// Tensors in the order of the file, with their bytes in it.
    pub tensors: Vec<(TensorSpec, Range<u64>)>,
}

impl FilePlan {
    /// Lays tensors out as the safetensors library does: wide types first, which keeps all aligned, then by
    /// name. So files have the size to the byte that other writers give them.
    pub fn new(mut specs: Vec<TensorSpec>, metadata: &[(&str, String)]) -> Self {
        specs.sort_by(|a, b| (Reverse(a.dtype.size()), &a.name).cmp(&(Reverse(b.dtype.size()), &b.name)));
        let mut json = Map::new();
        if !metadata.is_empty() {
            json.insert("__metadata__".into(), metadata.iter().map(|(k, v)| (*k, json!(v))).collect());
        }
        let mut offset = 0;
        for spec in &specs {
            let end = offset + spec.bytes();
            let entry =
                json!({ "dtype": spec.dtype.name(), "shape": spec.shape, "data_offsets": [offset, end] });
            json.insert(spec.name.clone(), entry);
            offset = end;
        }
        let header = encode(&Value::Object(json));
        let mut end = header.len() as u64;
        let tensors = specs.into_iter().map(|spec| {
            let start = end;
            end += spec.bytes();
            (spec, start..end)
        });
        Self { tensors: tensors.collect(), header }
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.tensors.last().map_or(self.header.len() as u64, |(_, range)| range.end)
    }
}

/// Consecutive tensors by the files that they go to, each with its name. A file ends where it would grow beyond `max_bytes`
/// of data; a larger tensor stands alone.
pub fn shards(specs: Vec<TensorSpec>, max_bytes: u64) -> Vec<(String, Vec<TensorSpec>)> {
    let (mut shards, mut size) = (vec![Vec::new()], 0);
    for spec in specs {
        if size > 0 && size + spec.bytes() > max_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += spec.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(spec);
        }
    }
    let count = shards.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    shards.into_iter().enumerate().map(|(i, specs)| (name(i), specs)).collect()
}

fn encode(json: &Value) -> Vec<u8> {
    let mut text = json.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

/// Writes a file under a temporary name beside it, makes it durable and renames it: it is there whole or not
/// at all. A failed write leaves nothing behind.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::io(path)(io::ErrorKind::InvalidFilename.into()));
    };
    let partial = path.with_file_name(format!(".{}.partial", name.to_string_lossy()));
    let written = File::create(&partial).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(&partial, path)
    });
    written.map_err(|cause| {
        // The first failure is the one to report, whether or not cleaning up works.
        let _ = fs::remove_file(&partial);
        Error::io(path)(cause)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::layout::{StoredDtype, artifact_tensors};
    use crate::quant_config::QuantConfig;

    #[test]
    fn files_have_the_published_sizes_to_the_byte() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let published = [
            (4, Some(128), 5_861_746_152),
            (4, Some(32), 6_241_200_048),
            (8, None, 8_977_344_096),
            (8, Some(128), 9_125_046_312),
            (8, Some(32), 9_580_390_896),
            (4, Some(64), 5_988_230_696),
        ];
        for (bits, group_size, bytes) in published {
            let quant = QuantConfig { bits, group_size, ..QuantConfig::default() };
            let metadata = [
                ("format", "pt".into()),
                ("auto_gptq_version", "0.4.2".into()),
                ("gptq_bits", bits.to_string()),
                ("gptq_group_size", group_size.map_or("-1".into(), |size: usize| size.to_string())),
                ("gptq_desc_act", "True".into()),
                ("gptq_damp_percent", "0.1".into()),
            ];
            let plan = FilePlan::new(artifact_tensors(&config, &quant, true), &metadata);
            assert_eq!(plan.file_bytes(), bytes);
        }
    }

    #[test]
    fn the_safetensors_library_reads_a_planned_file() {
        let specs = vec![
            TensorSpec::new("b", StoredDtype::F16, [3]),
            TensorSpec::new("a", StoredDtype::F16, [1, 2]),
            TensorSpec::new("c", StoredDtype::I32, [1]),
        ];
        let plan = FilePlan::new(specs, &[("format", "pt".into())]);
        let mut file = plan.header.clone();
        file.resize(plan.file_bytes() as usize, 7);
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("b").unwrap().shape(), [3]);
        assert_eq!(plan.tensors.iter().map(|(s, _)| &s.name[..]).collect::<String>(), "cab");
        assert!(plan.tensors[0].1.start.is_multiple_of(8));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"new")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(failed.unwrap_err().to_string().contains("model.safetensors"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
