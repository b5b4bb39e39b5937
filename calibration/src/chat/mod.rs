//! Chat templates: messages to the text that the model was trained on.

mod conversation;

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use chrono::Local;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;

pub use conversation::{Conversation, message};

use crate::error::{Error, Result};
use crate::tokenizer_config::{self, TokenizerConfig};

/// What ends a turn, in ChatML, Llama 3, Phi 3 and Llama 2.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "</s>"];
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// A model's Jinja template, rendered as `transformers` does: the same whitespace rules, Python's methods on
/// values, `raise_exception` and `strftime_now`.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    default_system: Option<String>,
}

impl ChatTemplate {
    /// The template of a model's folder: chat_template.jinja, else `chat_template` in tokenizer_config.json,
    /// which also names the bos and eos tokens.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] when there is neither.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = TokenizerConfig::load(folder)?;
        let path = folder.join(TEMPLATE_FILE);
        match fs::read_to_string(&path) {
            Ok(source) => {
                Self::from_source(&source, config.bos_token.as_deref(), config.eos_token.as_deref())
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Self::new(config, &folder.display().to_string())
            }
            Err(cause) => Err(Error::io(&path)(cause)),
        }
    }

    /// The template inside the contents of a tokenizer_config.json.
    pub fn from_config(tokenizer_config_json: &[u8]) -> Result<Self> {
        let at = tokenizer_config::FILE_NAME;
        Self::new(TokenizerConfig::parse(tokenizer_config_json, at)?, at)
    }

    /// Checks the template's syntax; a token that is `None` is undefined in it.
    pub fn from_source(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let environment = environment();
        environment.template_from_named_str(TEMPLATE_FILE, source).map_err(Error::ChatTemplate)?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
            default_system: None,
        })
    }

    fn new(config: TokenizerConfig, at: &str) -> Result<Self> {
        let source = config.chat_template.ok_or_else(|| Error::NoChatTemplate { at: at.to_owned() })?;
        Self::from_source(&source, config.bos_token.as_deref(), config.eos_token.as_deref())
    }

    /// The system message of conversations that have none. Without one they stay without.
    pub fn with_default_system(mut self, text: Option<String>) -> Self {
        self.default_system = text;
        self
    }

    /// The text of a conversation. Encode it without adding special tokens: the template has brought them.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] where the template fails, or refuses the messages by `raise_exception`.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        let token = |token: &Option<String>| token.as_deref().map_or(Value::UNDEFINED, Value::from);
        let context = context! {
            messages => self.messages(conversation.messages),
            add_generation_prompt => conversation.add_generation_prompt,
            bos_token => token(&self.bos_token),
            eos_token => token(&self.eos_token),
            // Templates may test them against none without asking whether they are defined.
            tools => conversation.tools.map_or(Value::from(()), Value::from_serialize),
            documents => Value::from(()),
            ..Value::from_serialize(conversation.kwargs)
        };
        self.environment.render_named_str(TEMPLATE_FILE, &self.source, context).map_err(Error::ChatTemplate)
    }

    fn messages(&self, messages: &[serde_json::Value]) -> Vec<Value> {
        let has_system = messages.iter().any(|message| message["role"] == "system");
        let default = self.default_system.as_deref().filter(|_| !has_system);
        let default = default.map(|text| Value::from_serialize(message("system", text)));
        default.into_iter().chain(messages.iter().map(Value::from_serialize)).collect()
    }

    /// The end-of-turn markers that the template writes. A tokenizer's eos token may be another one: without
    /// these in the stop set a chat runs on into the next turn.
    pub fn stop_tokens(&self) -> Vec<&'static str> {
        END_OF_TURN.into_iter().filter(|marker| self.source.contains(marker)).collect()
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Unlike minijinja's own filter it does not escape for HTML.
fn to_json(value: Value) -> Result<String, minijinja::Error> {
    serde_json::to_string(&value)
        .map_err(|cause| minijinja::Error::new(ErrorKind::BadSerialization, cause.to_string()))
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time, formatted as C's strftime does.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    match write!(text, "{}", Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("`{format}` is no strftime format"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] \
        + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::from_source(source, Some("<s>"), None).unwrap()
    }

    fn render(source: &str, messages: &[serde_json::Value]) -> String {
        let conversation = Conversation { add_generation_prompt: false, ..Conversation::new(messages) };
        template(source).render(&conversation).unwrap()
    }

    fn refused(source: &str) -> String {
        template(source).render(&Conversation::new(&[])).unwrap_err().to_string()
    }

    #[test]
    fn chatml_turns_end_and_the_assistant_is_prompted() {
        let messages = [message("system", "Be brief."), message("user", "Hi\nthere")];
        let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n";
        assert_eq!(render(CHATML, &messages), text);
        let prompted = template(CHATML).render(&Conversation::new(&messages)).unwrap();
        assert_eq!(prompted, format!("{text}<|im_start|>assistant\n"));
    }

    #[test]
    fn a_system_message_is_added_only_where_it_was_asked_for_and_there_is_none() {
        let roles = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
        let (user, blank) = (message("user", "Hi"), message("system", " "));
        assert_eq!(render(roles, &[user.clone()]), "user:Hi;");
        let asked = template(roles).with_default_system(Some("Be brief.".into()));
        let rendered = |messages: &[_]| asked.render(&Conversation::new(messages)).unwrap();
        assert_eq!(rendered(&[user.clone()]), "system:Be brief.;user:Hi;");
        assert_eq!(rendered(&[blank, user]), "system: ;user:Hi;");
    }

    #[test]
    fn templates_written_for_python_render_the_same() {
        for (source, expected) in [
            (
                "{%- for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}",
                "b ",
            ),
            ("{{ messages[0]['content'].strip().upper().startswith('A') }}", "True"),
            ("{{ bos_token }}{% if eos_token is defined %}!{% endif %}{{ eos_token }}", "<s>"),
            ("{% if tools is not none %}tools{% else %}none{% endif %}", "none"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("{{ '<a&\\'b\\'>' | tojson }}", "\"<a&'b'>\""),
        ] {
            let messages = [message("user", " a"), message("user", "b ")];
            assert_eq!(render(source, &messages).trim_end_matches('\n'), expected, "{source}");
        }
    }

    #[test]
    fn a_template_can_refuse_the_messages() {
        let error = refused("{{ raise_exception('roles must alternate') }}");
        assert!(error.contains("roles must alternate") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn the_date_is_formatted_and_a_bad_format_is_an_error() {
        let date = render("{{ strftime_now('%d %b %Y') }}", &[]);
        assert!(chrono::NaiveDate::parse_from_str(&date, "%d %b %Y").is_ok(), "{date}");
        let error = refused("{{ strftime_now('%Q') }}");
        assert!(error.contains("%Q"), "{error}");
    }

    #[test]
    fn a_syntax_error_is_found_when_the_template_is_loaded() {
        let error = ChatTemplate::from_source("{% for %}", None, None).err().unwrap().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
    }

    #[test]
    fn end_of_turn_markers_are_those_of_the_template() {
        assert_eq!(template(CHATML).stop_tokens(), ["<|im_end|>"]);
        assert_eq!(template("{{ '<|endoftext|>' }}").stop_tokens(), [""; 0]);
    }

    #[test]
    fn the_file_wins_over_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let load = || ChatTemplate::load(folder.path());
        let error = load().err().unwrap();
        assert!(matches!(&error, Error::NoChatTemplate { .. }), "{error}");
        let config = r#"{"bos_token": "<s>", "chat_template": "config {{ bos_token }}"}"#;
        fs::write(folder.path().join(tokenizer_config::FILE_NAME), config).unwrap();
        assert_eq!(load().unwrap().render(&Conversation::new(&[])).unwrap(), "config <s>");
        assert_eq!(
            ChatTemplate::from_config(config.as_bytes()).unwrap().render(&Conversation::new(&[])).unwrap(),
            "config <s>"
        );
        fs::write(folder.path().join(TEMPLATE_FILE), "file {{ bos_token }}").unwrap();
        assert_eq!(load().unwrap().render(&Conversation::new(&[])).unwrap(), "file <s>");
    }
}
