//! What holds for all headers and all pairs of quantization configs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_runtime::checkpoint::Checkpoint;
use gptq_runtime::quant_config::QuantConfig;
use proptest::prelude::*;
use proptest::sample::select;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

fn opened(bytes: &[u8]) -> Result<Checkpoint, String> {
    let folder = folder(&[("model.safetensors", bytes)]);
    Checkpoint::open(folder.path()).map_err(|error| error.to_string())
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Tensors of a few types and shapes, empty ones among them.
fn tensors() -> impl Strategy<Value = Tensors> {
    let types = select(&[Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::I32, Dtype::I64, Dtype::U8][..]);
    let tensor = (types, prop::collection::vec(0usize..5, 0..4)).prop_flat_map(|(dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (Just(dtype), Just(shape), prop::collection::vec(any::<u8>(), bytes))
    });
    prop::collection::btree_map("[a-z.\"\\\\é]{1,12}", tensor, 1..6)
}

/// As the format's own library writes them.
fn written(tensors: &Tensors) -> Vec<u8> {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let (dtype, shape, data) = tensor;
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        })
        .collect();
    serialize(views, None).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn a_file_of_the_formats_own_library_is_read_as_it_was_written(tensors in tensors()) {
        let checkpoint = opened(&written(&tensors)).unwrap();
        prop_assert!(checkpoint.names().eq(tensors.keys().map(String::as_str)));
        for (name, (dtype, shape, data)) in &tensors {
            let entry = checkpoint.spec(name).unwrap();
            prop_assert_eq!((&entry.dtype, &entry.shape), (dtype, shape));
            prop_assert_eq!(checkpoint.raw(name).unwrap(), &data[..]);
        }
    }

    #[test]
    fn a_truncated_file_is_refused(tensors in tensors(), cut in any::<prop::sample::Index>()) {
        let whole = written(&tensors);
        prop_assert!(opened(&whole[..cut.index(whole.len())]).is_err());
    }

    #[test]
    fn a_damaged_header_is_read_or_refused(tensors in tensors(), place in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = written(&tensors);
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[place.index(header)] = byte;
        if let Ok(checkpoint) = opened(&bytes) {
            for name in checkpoint.names() {
                let entry = checkpoint.spec(name).unwrap();
                let bits = entry.shape.iter().product::<usize>() * entry.dtype.bitsize();
                prop_assert_eq!(checkpoint.raw(name).unwrap().len(), bits / 8);
            }
        }
    }
}

/// The settings that decide how tensors are read, with their possible values.
const SETTINGS: [(&str, &[&str]); 5] = [
    ("bits", &["2", "3", "4", "8"]),
    ("group_size", &["-1", "32", "128"]),
    ("desc_act", &["true", "false"]),
    ("sym", &["true", "false"]),
    ("checkpoint_format", &["\"gptq\"", "\"gptq_v2\""]),
];

/// A value for every setting.
fn settings() -> impl Strategy<Value = Map<String, Value>> {
    let setting = |(key, values): (&'static str, &'static [&'static str])| {
        select(values).prop_map(move |value| (key.to_owned(), serde_json::from_str(value).unwrap()))
    };
    SETTINGS.map(setting).to_vec().prop_map(|settings| settings.into_iter().collect())
}

fn read(
    own: Option<&Map<String, Value>>,
    section: Option<&Map<String, Value>>,
) -> Result<Option<QuantConfig>, String> {
    let own = own.map(|own| Value::Object(own.clone()).to_string());
    let model = section.map(|section| json!({"quantization_config": section}).to_string());
    let files = [("quantize_config.json", &own), ("config.json", &model)];
    let files: Vec<_> =
        files.iter().filter_map(|(name, text)| Some((*name, text.as_ref()?.as_bytes()))).collect();
    let folder = folder(&files);
    QuantConfig::read(Path::new(folder.path())).map_err(|error| error.to_string())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn files_that_agree_are_read_as_each_alone(settings in settings()) {
        let alone = read(Some(&settings), None).unwrap();
        prop_assert!(alone.is_some());
        prop_assert_eq!(&read(None, Some(&settings)).unwrap(), &alone);
        prop_assert_eq!(&read(Some(&settings), Some(&settings)).unwrap(), &alone);
    }

    #[test]
    fn what_one_file_leaves_out_is_taken_from_the_other(settings in settings(), in_own in prop::collection::vec(any::<bool>(), 5)) {
        let part = |of_own: bool| -> Map<String, Value> {
            let wanted = settings.iter().zip(&in_own).filter(|((key, _), own)| **own == of_own || matches!(key.as_str(), "bits" | "group_size"));
            wanted.map(|((key, value), _)| (key.clone(), value.clone())).collect()
        };
        prop_assert_eq!(read(Some(&part(true)), Some(&part(false))).unwrap(), read(Some(&settings), None).unwrap());
    }

    #[test]
    fn a_contradiction_is_refused_with_both_values(settings in settings(), key in 0usize..SETTINGS.len(), turn in 1usize..4) {
        let (key, values) = SETTINGS[key];
        let own = settings[key].to_string();
        let place = values.iter().position(|value| *value == own).unwrap();
        let other = values[(place + 1 + turn % (values.len() - 1)) % values.len()];
        prop_assume!(other != own);
        let mut section = settings.clone();
        section.insert(key.to_owned(), serde_json::from_str(other).unwrap());
        let message = read(Some(&settings), Some(&section)).unwrap_err();
        for part in [key, own.trim_matches('"'), other.trim_matches('"')] {
            prop_assert!(message.contains(part), "{} in {}", part, message);
        }
    }
}
