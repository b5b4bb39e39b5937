//! The safetensors files of an artifact, laid out before any work: names, headers, offsets and lengths.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use gptq_runtime::checkpoint::{FilePlan, shards};
use gptq_runtime::layout::TensorSpec;
use gptq_runtime::quant_config::QuantConfig;
use serde_json::{Map, Value, json};

/// Where everything will lie.
pub struct ArtifactLayout {
    pub files: Vec<FileLayout>,
    places: BTreeMap<String, Place>,
}

/// One safetensors file.
pub struct FileLayout {
    pub name: String,
    /// What the file starts with.
    pub header: Vec<u8>,
    /// Header and data.
    pub length: u64,
}

/// One tensor's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the file.
    pub file: usize,
    /// From the start of the file.
    pub bytes: Range<u64>,
}

impl ArtifactLayout {
    /// One file, or several, split in the tensors' given order where one would grow beyond `max_shard_size`
    /// bytes of data.
    pub fn new(specs: Vec<TensorSpec>, metadata: &[(&str, String)], max_shard_size: Option<u64>) -> Self {
        let shards = shards(specs, max_shard_size.unwrap_or(u64::MAX));
        let mut layout = Self { files: Vec::new(), places: BTreeMap::new() };
        for (file, (name, specs)) in shards.into_iter().enumerate() {
            let plan = FilePlan::new(specs, metadata);
            layout.files.push(FileLayout { name, length: plan.file_bytes(), header: plan.header });
            let places = plan.tensors.into_iter().map(|(spec, bytes)| (spec.name, Place { file, bytes }));
            layout.places.extend(places);
        }
        layout
    }

    pub fn place(&self, tensor: &str) -> Option<&Place> {
        self.places.get(tensor)
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Layers that have tensors.
    pub fn layers(&self) -> usize {
        let index = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        self.names().filter_map(index).collect::<BTreeSet<_>>().len()
    }

    /// Bytes of all files.
    pub fn length(&self) -> u64 {
        self.files.iter().map(|file| file.length).sum()
    }

    /// `model.safetensors.index.json`, where there are several files.
    pub fn index(&self) -> Option<Value> {
        let data: u64 = self.places.values().map(|place| place.bytes.end - place.bytes.start).sum();
        let map: Map<String, Value> = self
            .places
            .iter()
            .map(|(name, place)| (name.clone(), json!(self.files[place.file].name)))
            .collect();
        (self.files.len() > 1).then(|| json!({"metadata": {"total_size": data}, "weight_map": map}))
    }
}

/// What AutoGPTQ 0.4.2 writes into the header, so that sizes agree with published files to the byte. No reader
/// looks at it: `gptq_desc_act` is the order of solving here, also where the config says `desc_act: false`.
pub fn metadata(quant: &QuantConfig) -> [(&'static str, String); 6] {
    let desc_act = if quant.act_order { "True" } else { "False" };
    [
        ("format", "pt".into()),
        ("auto_gptq_version", "0.4.2".into()),
        ("gptq_bits", quant.bits.to_string()),
        ("gptq_group_size", quant.group_size_number().to_string()),
        ("gptq_desc_act", desc_act.into()),
        ("gptq_damp_percent", quant.damp_percent.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::recipe::Preset;
    use gptq_runtime::config::ModelConfig;
    use gptq_runtime::layout::{StoredDtype, artifact_tensors};
    use safetensors::SafeTensors;

    #[test]
    fn the_six_published_files_have_these_lengths() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let lengths = Plan::card(Preset::default()).branches.into_iter().map(|branch| {
            let quant = branch.quant_config();
            ArtifactLayout::new(artifact_tensors(&config, &quant, true), &metadata(&quant), None).length()
        });
        let published =
            [5_861_746_152, 6_241_200_048, 8_977_344_096, 9_125_046_312, 9_580_390_896, 5_988_230_696];
        assert_eq!(lengths.collect::<Vec<_>>(), published);
    }

    fn specs() -> Vec<TensorSpec> {
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        vec![
            spec("b", StoredDtype::F16, &[2, 3]),
            spec("c", StoredDtype::I32, &[2]),
            spec("a", StoredDtype::F16, &[1]),
        ]
    }

    #[test]
    fn the_library_reads_the_header_back() {
        let layout = ArtifactLayout::new(specs(), &[("format", "pt".into())], None);
        let mut bytes = layout.files[0].header.clone();
        bytes.resize(layout.length() as usize, 0);
        for (name, value) in [("a", 1u8), ("b", 2), ("c", 3)] {
            let place = layout.place(name).unwrap();
            bytes[place.bytes.start as usize..place.bytes.end as usize].fill(value);
        }
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("b").unwrap().shape(), [2, 3]);
        assert_eq!(file.tensor("a").unwrap().data(), [1; 2]);
        assert_eq!(file.tensor("c").unwrap().data(), [3; 8]);
    }

    #[test]
    fn shards_hold_every_tensor_once_and_an_index_finds_it() {
        let layout = ArtifactLayout::new(specs(), &[], Some(12));
        assert_eq!(layout.files.len(), 2);
        assert_eq!(layout.files[1].name, "model-00002-of-00002.safetensors");
        let index = layout.index().unwrap();
        assert_eq!(index["metadata"]["total_size"], 22);
        assert_eq!(index["weight_map"]["b"], "model-00001-of-00002.safetensors");
        assert_eq!(index["weight_map"]["a"], "model-00002-of-00002.safetensors");
    }
}
