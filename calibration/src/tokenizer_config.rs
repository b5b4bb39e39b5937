//! What this crate reads from tokenizer_config.json.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

pub(crate) const FILE_NAME: &str = "tokenizer_config.json";

#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the file in `folder`; without one, every field is `None`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        match fs::read(&path) {
            Ok(bytes) => Self::parse(&bytes, &path.display().to_string()),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(Error::io(&path)(cause)),
        }
    }

    pub fn parse(json: &[u8], at: &str) -> Result<Self> {
        let config: Value = serde_json::from_slice(json).map_err(|cause| Error::malformed(at, cause))?;
        Ok(Self {
            bos_token: token(&config, "bos_token", at)?,
            eos_token: token(&config, "eos_token", at)?,
            chat_template: chat_template(&config, at)?,
        })
    }
}

/// A token is written as a string, or as an object with its `content`.
fn token(config: &Value, key: &str, at: &str) -> Result<Option<String>> {
    match &config[key] {
        Value::Null => Ok(None),
        Value::String(token) => Ok(Some(token.clone())),
        object => match object["content"].as_str() {
            Some(token) => Ok(Some(token.to_owned())),
            None => {
                Err(Error::malformed(at, format!("{key}: expected a string or an object with `content`")))
            }
        },
    }
}

/// One template, or a list of named ones, of which `default` is the one for chats.
fn chat_template(config: &Value, at: &str) -> Result<Option<String>> {
    let template = match &config["chat_template"] {
        Value::Array(named) => {
            named.iter().find(|entry| entry["name"] == "default").map(|entry| &entry["template"])
        }
        Value::Null => return Ok(None),
        template => Some(template),
    };
    match template.and_then(Value::as_str) {
        Some(template) => Ok(Some(template.to_owned())),
        None => {
            Err(Error::malformed(at, "chat_template: expected a string, or a list with one named `default`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<TokenizerConfig> {
        TokenizerConfig::parse(json.as_bytes(), "x.json")
    }

    #[test]
    fn tokens_may_be_strings_or_objects() {
        let config =
            parse(r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}"#).unwrap();
        assert_eq!((config.bos_token.as_deref(), config.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
        let config = parse(r#"{"bos_token": null}"#).unwrap();
        assert!(config.bos_token.is_none() && config.eos_token.is_none() && config.chat_template.is_none());
    }

    #[test]
    fn of_several_templates_the_default_one_is_taken() {
        let json = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(parse(json).unwrap().chat_template.as_deref(), Some("d"));
    }

    #[test]
    fn malformed_files_are_named() {
        for json in ["", "{", r#"{"bos_token": 1}"#, r#"{"chat_template": []}"#, r#"{"chat_template": {}}"#] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.starts_with("x.json: "), "{error}");
        }
    }

    #[test]
    fn the_file_may_be_absent() {
        let folder = tempfile::tempdir().unwrap();
        assert!(TokenizerConfig::load(folder.path()).unwrap().eos_token.is_none());
    }
}
