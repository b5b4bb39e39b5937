//! What this crate reads from tokenizer_config.json and special_tokens_map.json.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use gptq_input::short;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

pub(crate) const FILE_NAME: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// The names that stand for tokens in any model; others end in `_token` and belong to one.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Ten times the largest of known models' (some 700 KB, nearly all of it `added_tokens_decoder`).
const MOST_BYTES: u64 = 8 << 20;

#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    /// Text of each token that has a name, such as `bos_token`.
    pub tokens: BTreeMap<String, String>,
    /// Source of each chat template by its name; `default` where there is but one.
    pub chat_templates: BTreeMap<String, String>,
}

impl TokenizerConfig {
    /// Reads the files in `folder`, either of which may be absent. As `transformers` has it, what
    /// special_tokens_map.json says wins, but the file is ignored beside a newer tokenizer_config.json, one that
    /// lists its added tokens itself.
    pub fn load(folder: &Path) -> Result<Self> {
        let (path, map_path) = (folder.join(FILE_NAME), folder.join(SPECIAL_TOKENS));
        let mut config = read(&path)?.unwrap_or_default();
        if !config.contains_key("added_tokens_decoder")
            && let Some(map) = read(&map_path)?
        {
            let at = map_path.display().to_string();
            for (name, value) in named_tokens(&map) {
                token(value).ok_or_else(|| bad_token(&at, name))?;
            }
            config.extend(map.into_iter().filter(|(name, _)| name != "chat_template"));
        }
        Self::new(&config, &path.display().to_string())
    }

    /// The contents of a tokenizer_config.json.
    pub fn parse(json: &[u8], at: &str) -> Result<Self> {
        Self::new(&parse(json, at)?, at)
    }

    fn new(config: &Map<String, Value>, at: &str) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for (name, value) in named_tokens(config) {
            if let Some(text) = token(value).ok_or_else(|| bad_token(at, name))? {
                tokens.insert(name.to_owned(), text);
            }
        }
        Ok(Self { tokens, chat_templates: chat_templates(config.get("chat_template"), at)? })
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.tokens.get("bos_token").map(String::as_str)
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.tokens.get("eos_token").map(String::as_str)
    }
}

fn read(path: &Path) -> Result<Option<Map<String, Value>>> {
    match gptq_input::read(path, MOST_BYTES) {
        Ok(bytes) => parse(&bytes, &path.display().to_string()).map(Some),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io(path)(cause)),
    }
}

fn parse(json: &[u8], at: &str) -> Result<Map<String, Value>> {
    match gptq_input::parse(json) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::malformed(at, "expected an object")),
        Err(problem) => Err(Error::malformed(at, problem)),
    }
}

/// Tokens by their names: those of any model, the model's own, and those listed as `extra_special_tokens`.
fn named_tokens(config: &Map<String, Value>) -> impl Iterator<Item = (&str, &Value)> {
    let own =
        |name: &str, value: &Value| name.ends_with("_token") && (value.is_string() || value.is_object());
    let of_any =
        config.iter().filter(move |(name, value)| TOKENS.contains(&name.as_str()) || own(name, value));
    let extra = config.get("extra_special_tokens").and_then(Value::as_object);
    of_any.chain(extra.into_iter().flatten()).map(|(name, value)| (name.as_str(), value))
}

/// A token is written as a text, or as an object with its `content`; null says that there is none.
fn token(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Null => Some(None),
        value => Some(Some(value.as_str().or_else(|| value.get("content")?.as_str())?.to_owned())),
    }
}

fn bad_token(at: &str, name: &str) -> Error {
    Error::malformed(at, format!("{}: expected a string or an object with `content`", short(name)))
}

/// One template, or several with names.
fn chat_templates(value: Option<&Value>, at: &str) -> Result<BTreeMap<String, String>> {
    let bad = || Error::malformed(at, "chat_template: expected a string, or a list of templates with names");
    let named = |name: Option<&str>, template: Option<&Value>| {
        let template = template.and_then(Value::as_str);
        name.zip(template).map(|(name, template)| (name.to_owned(), template.to_owned())).ok_or_else(bad)
    };
    match value {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(one @ Value::String(_)) => Ok(BTreeMap::from([named(Some("default"), Some(one))?])),
        Some(Value::Array(list)) if !list.is_empty() => {
            list.iter().map(|entry| named(entry["name"].as_str(), entry.get("template"))).collect()
        }
        Some(Value::Object(map)) if !map.is_empty() => {
            map.iter().map(|(name, template)| named(Some(name), Some(template))).collect()
        }
        Some(_) => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn parsed(json: &str) -> Result<TokenizerConfig> {
        TokenizerConfig::parse(json.as_bytes(), "x.json")
    }

    #[test]
    fn tokens_may_be_strings_or_objects() {
        let config = parsed(
            r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "add_bos_token": true,
                "image_token": "<i>", "extra_special_tokens": {"eoc_token": "<c>"}, "unk_token": null}"#,
        );
        let tokens = config.unwrap().tokens;
        let tokens: Vec<_> = tokens.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert_eq!(
            tokens,
            [("bos_token", "<s>"), ("eoc_token", "<c>"), ("eos_token", "</s>"), ("image_token", "<i>")]
        );
    }

    #[test]
    fn several_templates_keep_their_names() {
        for json in [
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            r#"{"chat_template": {"tool_use": "t", "default": "d"}}"#,
        ] {
            let templates = parsed(json).unwrap().chat_templates;
            assert_eq!((&templates["default"][..], &templates["tool_use"][..]), ("d", "t"));
        }
        assert_eq!(parsed(r#"{"chat_template": "d"}"#).unwrap().chat_templates["default"], "d");
    }

    #[test]
    fn malformed_files_are_named() {
        for json in
            ["", "{", "[]", r#"{"bos_token": 1}"#, r#"{"chat_template": []}"#, r#"{"chat_template": {}}"#]
        {
            let error = parsed(json).unwrap_err().to_string();
            assert!(error.starts_with("x.json: "), "{error}");
        }
    }

    /// As transformers 5.24 reads such files.
    #[test]
    fn the_map_of_special_tokens_wins_unless_the_configuration_lists_its_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = |config: &str, map: &str| {
            fs::write(folder.path().join(FILE_NAME), config).unwrap();
            fs::write(folder.path().join(SPECIAL_TOKENS), map).unwrap();
            let config = TokenizerConfig::load(folder.path()).unwrap();
            (config.bos_token().map(str::to_owned), config.eos_token().map(str::to_owned))
        };
        let map = r#"{"bos_token": "<b>", "eos_token": {"content": "</s>"}}"#;
        let both = (Some("<b>".to_owned()), Some("</s>".to_owned()));
        assert_eq!(tokens("{}", map), both);
        assert_eq!(tokens(r#"{"bos_token": "<s>"}"#, map), both);
        let listed = r#"{"bos_token": "<s>", "added_tokens_decoder": {}}"#;
        assert_eq!(tokens(listed, map), (Some("<s>".to_owned()), None));
    }

    #[test]
    fn the_files_may_be_absent() {
        let folder = tempfile::tempdir().unwrap();
        assert!(TokenizerConfig::load(folder.path()).unwrap().eos_token().is_none());
    }
}
