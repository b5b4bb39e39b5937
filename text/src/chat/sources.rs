//! Where a model's templates come from.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::limits::SOURCE_BYTES;
use crate::error::{Error, Result};
use crate::tokenizer;
use crate::tokenizer_config::TokenizerConfig;

pub(super) const FILE_NAME: &str = "chat_template.jinja";
const FOLDER: &str = "additional_chat_templates";
const CHATML: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// For models that know ChatML by its tokens alone: they expect a system message that is not empty.
const CHATML_TEMPLATE: &str = "\
{%- set default = 'You are a helpful assistant.' %}
{%- if not messages or messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\n' + default + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- set content = message['content'] %}
{%- if message['role'] == 'system' and not content | trim %}{% set content = default %}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Templates by their names: those in files of their own, or else those of the tokenizer's configuration, or else
/// ChatML for a tokenizer that has its tokens.
pub(super) fn find(folder: &Path, config: &TokenizerConfig) -> Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    if let Some(source) = read(&folder.join(FILE_NAME))? {
        sources.insert("default".to_owned(), source);
    }
    let additional = folder.join(FOLDER);
    for entry in fs::read_dir(&additional).into_iter().flatten() {
        let path = entry.map_err(Error::io(&additional))?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|it| it == "jinja")) {
            sources.insert(name, read(&path)?.unwrap_or_default());
        }
    }
    if sources.is_empty() {
        sources = config.chat_templates.clone();
    }
    if sources.is_empty() && knows_chatml(&folder.join("tokenizer.json"))? {
        sources.insert("default".to_owned(), CHATML_TEMPLATE.to_owned());
    }
    Ok(sources)
}

fn read(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read_bytes(path, SOURCE_BYTES as u64)? else { return Ok(None) };
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|cause| Error::malformed(path.display(), format!("expected UTF-8 text: {cause}")))
}

fn read_bytes(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    match gptq_input::read(path, most) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io(path)(cause)),
    }
}

/// What tells of ChatML in a tokenizer.json; the rest is not kept.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Known {
    added_tokens: Vec<Added>,
    model: KnownModel,
}

#[derive(Deserialize)]
struct Added {
    #[serde(default)]
    content: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct KnownModel {
    vocab: Vocabulary,
}

/// Which of ChatML's tokens a vocabulary has.
#[derive(Default)]
struct Vocabulary([bool; 2]);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;

        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let mut found = Vocabulary::default();
                while let Some((token, _)) = map.next_entry::<String, IgnoredAny>()? {
                    (0..2).for_each(|i| found.0[i] |= CHATML[i] == token);
                }
                Ok(found)
            }

            /// The vocabulary of a unigram model is a list; what it knows of ChatML is added.
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Vocabulary, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocabulary::default())
            }
        }

        deserializer.deserialize_any(Tokens)
    }
}

fn knows_chatml(path: &Path) -> Result<bool> {
    let Some(json) = read_bytes(path, tokenizer::MOST_BYTES)? else { return Ok(false) };
    // Larger than most, and not worth its reading where the tokens are nowhere in it.
    let text = String::from_utf8_lossy(&json);
    if !CHATML.iter().all(|token| text.contains(token)) {
        return Ok(false);
    }
    let known: Known = serde_json::from_slice(&json)
        .map_err(|cause| Error::malformed(path.display(), gptq_input::short_line(&cause.to_string())))?;
    let is_added = |token: &str| known.added_tokens.iter().any(|it| it.content == token);
    Ok((0..2).all(|i| is_added(CHATML[i]) || known.model.vocab.0[i]))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::{ChatTemplate, Conversation, message};
    use super::*;

    struct Model(tempfile::TempDir);

    impl Model {
        fn with(files: &[(&str, &str)]) -> Self {
            let model = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(name, text)| model.write(name, text));
            model
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn prompt(&self, messages: &[Value], tools: Option<&Value>) -> Result<String> {
            let conversation = Conversation { tools, ..Conversation::new(messages) };
            ChatTemplate::load(self.0.path())?.render(&conversation)
        }
    }

    #[test]
    fn files_of_templates_win_over_the_configuration() {
        let model = Model::with(&[]);
        let tools = serde_json::json!([{}]);
        assert!(matches!(model.prompt(&[], None).unwrap_err(), Error::NoChatTemplate { .. }));
        let config = r#"{"bos_token": "<s>", "chat_template": "config {{ bos_token }}"}"#;
        model.write("tokenizer_config.json", config);
        assert_eq!(model.prompt(&[], Some(&tools)).unwrap(), "config <s>");
        model.write("chat_template.jinja", "file {{ bos_token }}");
        assert_eq!(model.prompt(&[], Some(&tools)).unwrap(), "file <s>");
        model.write("additional_chat_templates/tool_use.jinja", "tools");
        assert_eq!(model.prompt(&[], Some(&tools)).unwrap(), "tools");
        assert_eq!(model.prompt(&[], None).unwrap(), "file <s>");
    }

    #[test]
    fn a_tokenizer_that_knows_chatml_gets_its_template_with_a_system_message() {
        let tokenizer = |tokens: &[&str]| {
            let added: Vec<_> = tokens.iter().map(|it| serde_json::json!({"content": it})).collect();
            serde_json::json!({"added_tokens": added, "model": {"vocab": {"<|im_end|>": 1}}}).to_string()
        };
        let chatml = Model::with(&[("tokenizer.json", &tokenizer(&["<|im_start|>"]))]);
        let (user, own) = (message("user", " Hi"), message("system", "Be brief."));
        let rest = "<|im_start|>user\n Hi<|im_end|>\n<|im_start|>assistant\n";
        let default = format!("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{rest}");
        assert_eq!(chatml.prompt(std::slice::from_ref(&user), None).unwrap(), default);
        assert_eq!(chatml.prompt(&[message("system", " "), user.clone()], None).unwrap(), default);
        let prompt = chatml.prompt(&[own, user.clone()], None).unwrap();
        assert_eq!(prompt, format!("<|im_start|>system\nBe brief.<|im_end|>\n{rest}"));
        let other = Model::with(&[("tokenizer.json", &tokenizer(&["<s>"]))]);
        assert!(matches!(other.prompt(&[user], None).unwrap_err(), Error::NoChatTemplate { .. }));
    }
}
