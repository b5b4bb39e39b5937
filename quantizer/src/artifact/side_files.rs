//! The small files beside the weights.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use gptq_runtime::config::ModelConfig;
use gptq_runtime::quant_config::QuantConfig;
use serde_json::{Value, json};

use crate::{Error, Result};

/// Files that are copied as they are, where the source has them.
const COPIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// Whether a file of this name belongs to a model's licence.
pub fn is_licence(name: &str) -> bool {
    let beginnings = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING"];
    beginnings.iter().any(|beginning| name.to_uppercase().starts_with(beginning))
}

/// Names and contents: both configs, and the source's tokenizer and licence files. `quant` is what the configs
/// shall say, see [`crate::engines::as_written`]; `meta` is what quantize_config.json says beside it.
pub fn side_files(
    source: &Path,
    model_config: &ModelConfig,
    quant: &QuantConfig,
    model: &str,
    meta: Option<Value>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let mut own = quant.to_quantize_config_json(model);
    if let Some(meta) = meta {
        own["meta"] = meta;
    }
    let mut files = vec![
        ("config.json".into(), config(&source.join("config.json"), model_config, quant)?),
        ("quantize_config.json".into(), pretty(&own)),
    ];
    for entry in fs::read_dir(source).map_err(Error::io(source))? {
        let entry = entry.map_err(Error::io(source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if (COPIED.contains(&name.as_str()) || is_licence(&name)) && entry.path().is_file() {
            /// More than any tokenizer has.
            const MOST_BYTES: u64 = 128 << 20;
            let bytes = gptq_input::read(&entry.path(), MOST_BYTES).map_err(Error::io(&entry.path()))?;
            files.push((name, bytes));
        }
    }
    files.sort();
    Ok(files)
}

/// The source's config, its keys in their order, and how the weights were quantized. What the source says of its class and
/// its head is corrected where the artifact's tensors are others: readers go by it.
fn config(path: &Path, model: &ModelConfig, quant: &QuantConfig) -> Result<Vec<u8>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let invalid = |problem: &dyn Display| Error::invalid(path.display(), problem);
    let mut value: Value = serde_json::from_str(&text).map_err(|error| invalid(&error))?;
    let map = value.as_object_mut().ok_or_else(|| invalid(&"expected an object"))?;
    let class = json!([model.architecture.class_name()]);
    if map.get("architectures").is_some_and(|named| *named != class) {
        map.insert("architectures".into(), class);
    }
    if map.get("tie_word_embeddings").is_some_and(|tied| *tied != json!(model.tie_word_embeddings)) {
        map.insert("tie_word_embeddings".into(), json!(model.tie_word_embeddings));
    }
    map.insert("quantization_config".into(), quant.to_quantization_config_json());
    Ok(pretty(&value))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_keeps_its_keys_and_only_known_files_come_along() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "LICENSE.txt", "notes.txt", "model.safetensors"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::write(
            dir.path().join("config.json"),
            r#"{"zeta": 1, "tie_word_embeddings": true, "architectures": ["LlamaModel"]}"#,
        )
        .unwrap();
        let model = ModelConfig::preset("llama2-7b").unwrap();
        let files =
            side_files(dir.path(), &model, &QuantConfig::default(), "m", Some(json!({"a": 1}))).unwrap();
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["LICENSE.txt", "config.json", "quantize_config.json", "tokenizer.json"]);
        let own: Value = serde_json::from_slice(&files[2].1).unwrap();
        assert_eq!((&own["meta"], &own["desc_act"]), (&json!({"a": 1}), &json!(false)));
        let config: Value = serde_json::from_slice(&files[1].1).unwrap();
        let keys: Vec<_> = config.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["zeta", "tie_word_embeddings", "architectures", "quantization_config"]);
        assert_eq!(config["tie_word_embeddings"], false, "as the artifact has it");
        assert_eq!(config["architectures"], json!(["LlamaForCausalLM"]));
    }
}
