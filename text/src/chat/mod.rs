//! Chat templates: messages to the text that the model was trained on.

mod bounded;
mod content;
mod conversation;
mod environment;
mod filters;
mod json;
mod limits;
mod methods;
mod numbers;
mod operations;
mod operators;
mod python;
mod source;
mod sources;
mod text_methods;
mod values;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use gptq_input::{guard, short_line};
use minijinja::Environment;
use minijinja::value::Value;
use serde_json::Value as Json;

pub use conversation::{Conversation, message};
use environment::environment;
use limits::Input;
use values::value_of;

use crate::error::{Error, Result};
use crate::tokenizer_config::{self, TokenizerConfig};

/// What ends a turn, in ChatML, Llama 3, Phi 3 and Llama 2.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "</s>"];

/// A model's Jinja templates, rendered as `transformers` does: the same whitespace rules, Python's methods on
/// values and Python's way to print them, `tojson`, `raise_exception` and `strftime_now`.
///
/// A template is an untrusted program. It runs on a thread of its own within limits on its size, its steps, its
/// memory and its time (`chat/limits.rs`); one that breaks them is an error of the prompt that was asked for.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    default: Option<Template>,
    /// Taken where tools are given.
    tool_use: Option<Template>,
    /// Texts of special tokens by their names, such as `bos_token`.
    tokens: BTreeMap<String, String>,
    default_system: Option<String>,
}

struct Template {
    source: String,
    /// The same for the engine, within the limits.
    bounded: Arc<str>,
    /// Whether it goes through the parts of a content itself.
    iterates: bool,
}

impl Template {
    /// # Errors
    /// [`Error::ChatTemplate`] for a source that is too large, or that the engine cannot parse.
    fn new(source: &str, environment: &Arc<Environment<'static>>) -> Result<Self> {
        bounded::check(source).map_err(Error::ChatTemplate)?;
        let (environment, source) = (environment.clone(), source.to_owned());
        run(Input::default(), move || {
            let iterates = source::iterates_over_content(&source);
            let source = source::for_engine(&source);
            let bounded = bounded::bounded(&source);
            environment.template_from_named_str(sources::FILE_NAME, &bounded)?;
            Ok(Self { source, bounded: bounded.into(), iterates })
        })
    }
}

/// Runs the engine apart from everything else, within the limits.
fn run<T: Send + 'static>(
    input: Input,
    work: impl FnOnce() -> Result<T, minijinja::Error> + Send + 'static,
) -> Result<T> {
    let within = move || {
        limits::begin(input);
        let result = work();
        match limits::broken() {
            Some(limit) => Err(limit),
            None => result.map_err(|cause| short_line(&cause.to_string())),
        }
    };
    let stack = limits::stack(limits::fuel(input));
    guard::apart(stack, limits::DEADLINE, within).and_then(|result| result).map_err(Error::ChatTemplate)
}

impl ChatTemplate {
    /// The templates of a model's folder: chat_template.jinja and additional_chat_templates/*.jinja, else
    /// `chat_template` in tokenizer_config.json, else ChatML's where the tokenizer has its tokens.
    /// tokenizer_config.json and special_tokens_map.json name the tokens that templates know.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] when there is none.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = TokenizerConfig::load(folder)?;
        let sources = sources::find(folder, &config)?;
        Self::new(&sources, config.tokens, &folder.display().to_string())
    }

    /// The templates inside the contents of a tokenizer_config.json.
    pub fn from_config(tokenizer_config_json: &[u8]) -> Result<Self> {
        let at = tokenizer_config::FILE_NAME;
        let config = TokenizerConfig::parse(tokenizer_config_json, at)?;
        Self::new(&config.chat_templates, config.tokens, at)
    }

    fn new(sources: &BTreeMap<String, String>, tokens: BTreeMap<String, String>, at: &str) -> Result<Self> {
        let environment = Arc::new(environment());
        let named =
            |name: &str| sources.get(name).map(|source| Template::new(source, &environment)).transpose();
        let (default, tool_use) = (named("default")?, named("tool_use")?);
        if default.is_none() && tool_use.is_none() {
            return Err(Error::NoChatTemplate { at: at.to_owned() });
        }
        Ok(Self { environment, default, tool_use, tokens, default_system: None })
    }

    /// The system message of conversations that have none. Without one they stay without.
    pub fn with_default_system(mut self, text: Option<String>) -> Self {
        self.default_system = text;
        self
    }

    /// The text of a conversation. Encode it without adding special tokens: the template has brought them.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] where the template fails, or refuses the messages by `raise_exception`;
    /// [`Error::Conversation`] for messages and tools of another shape, parts that are no text, and a last message
    /// that cannot be continued.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        let tools = conversation.tools.filter(|tools| !tools.is_null());
        check(conversation, tools)?;
        let template = self.template(tools.is_some()).ok_or_else(|| {
            Error::Conversation("chat template: there is one for tools alone, and no tools are given".into())
        })?;
        let system = self.default_system(conversation.messages);
        let messages = system.iter().chain(conversation.messages);
        let mut messages =
            messages.map(|it| content::prepared(it, template.iterates)).collect::<Result<Vec<_>>>()?;
        let continued =
            conversation.continue_final_message.then(|| content::mark_end(&mut messages)).transpose()?;
        let mut variables: BTreeMap<String, Json> =
            self.tokens.iter().map(|(name, text)| (name.clone(), text.as_str().into())).collect();
        variables.insert("messages".into(), messages.into_iter().map(Json::from).collect());
        variables.insert("add_generation_prompt".into(), conversation.add_generation_prompt.into());
        // Templates may test them against none without asking whether they are defined.
        variables.insert("tools".into(), tools.cloned().unwrap_or_default());
        variables.insert("documents".into(), Json::Null);
        variables.extend(conversation.kwargs.iter().map(|(name, value)| (name.clone(), value.clone())));
        let prompt = self.prompt(template, variables)?;
        match continued {
            Some(text) => content::cut_at_end(prompt, &text),
            None => Ok(prompt),
        }
    }

    fn prompt(&self, template: &Template, variables: BTreeMap<String, Json>) -> Result<String> {
        let mut input = Input::default();
        variables.values().for_each(|value| input.add(value));
        let (environment, source) = (self.environment.clone(), template.bounded.clone());
        run(input, move || {
            let mut environment = (*environment).clone();
            environment.set_fuel(Some(limits::fuel(input)));
            let variables: BTreeMap<&str, Value> =
                variables.iter().map(|(name, value)| (name.as_str(), value_of(value))).collect();
            let mut prompt = limits::Prompt::new(input);
            let template = environment.template_from_named_str(sources::FILE_NAME, &source)?;
            template.render_captured_to(variables, &mut prompt)?;
            Ok(prompt.into_text())
        })
    }

    /// The source of the template that a conversation with or without tools takes.
    pub fn source(&self, with_tools: bool) -> Option<&str> {
        self.template(with_tools).map(|template| template.source.as_str())
    }

    fn template(&self, with_tools: bool) -> Option<&Template> {
        self.tool_use.as_ref().filter(|_| with_tools).or(self.default.as_ref())
    }

    fn default_system(&self, messages: &[Json]) -> Option<Json> {
        let has_system = messages.iter().any(|message| message["role"] == "system");
        self.default_system.as_deref().filter(|_| !has_system).map(|text| message("system", text))
    }

    /// The end-of-turn markers that the template writes. A tokenizer's eos token may be another one: without
    /// these in the stop set a chat runs on into the next turn.
    pub fn stop_tokens(&self) -> Vec<&'static str> {
        let sources = || self.default.iter().chain(&self.tool_use).map(|template| &template.source);
        END_OF_TURN.into_iter().filter(|marker| sources().any(|source| source.contains(marker))).collect()
    }
}

fn check(conversation: &Conversation, tools: Option<&Json>) -> Result<()> {
    let refused = |message: &str| Err(Error::Conversation(message.into()));
    if conversation.continue_final_message && conversation.add_generation_prompt {
        return refused(
            "continue_final_message and add_generation_prompt are not compatible: the one goes on with the last \
             message, the other begins a new one",
        );
    }
    if tools.is_some_and(|tools| !tools.as_array().is_some_and(|tools| tools.iter().all(Json::is_object))) {
        return refused("tools: expected a list of objects");
    }
    match conversation.kwargs.contains_key("messages") {
        true => refused("chat_template_kwargs: expected no `messages`, which the conversation has"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] \
        + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        from_source(source).unwrap()
    }

    fn from_source(source: &str) -> Result<ChatTemplate> {
        let sources = BTreeMap::from([("default".into(), source.into())]);
        ChatTemplate::new(&sources, BTreeMap::from([("bos_token".into(), "<s>".into())]), "here")
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
        assert_eq!(render(roles, std::slice::from_ref(&user)), "user:Hi;");
        let asked = template(roles).with_default_system(Some("Be brief.".into()));
        let rendered = |messages: &[_]| asked.render(&Conversation::new(messages)).unwrap();
        assert_eq!(rendered(std::slice::from_ref(&user)), "system:Be brief.;user:Hi;");
        assert_eq!(rendered(&[blank, user]), "system: ;user:Hi;");
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
        let error = from_source("{% for %}").err().unwrap().to_string();
        assert!(error.starts_with("chat template: syntax error"), "{error}");
    }

    #[test]
    fn end_of_turn_markers_are_those_of_the_template() {
        assert_eq!(template(CHATML).stop_tokens(), ["<|im_end|>"]);
        assert_eq!(template("{{ '<|endoftext|>' }}").stop_tokens(), [""; 0]);
    }

    #[test]
    fn the_template_for_tools_is_taken_where_there_are_tools() {
        let config = r#"{"chat_template": [{"name": "tool_use", "template": "{{ tools | length }} tools"},
            {"name": "default", "template": "plain"}]}"#;
        let template = ChatTemplate::from_config(config.as_bytes()).unwrap();
        for (tools, expected) in
            [(json!([{}]), "1 tools"), (json!([]), "0 tools"), (Json::Null, "plain"), (json!("no"), "")]
        {
            let conversation = Conversation { tools: Some(&tools), ..Conversation::new(&[]) };
            match template.render(&conversation) {
                Ok(prompt) => assert_eq!(prompt, expected),
                Err(error) => assert_eq!(error.to_string(), "tools: expected a list of objects"),
            }
        }
        assert_eq!(template.source(true), Some("{{ tools | length }} tools"));
    }

    #[test]
    fn further_variables_win_over_tokens_and_never_over_the_messages() {
        let source = template("{{ bos_token }}{{ enable_thinking }}{{ add_generation_prompt }}");
        let rendered = |kwargs: Json| {
            let kwargs = kwargs.as_object().unwrap();
            source
                .render(&Conversation { kwargs, ..Conversation::new(&[]) })
                .map_err(|error| error.to_string())
        };
        assert_eq!(rendered(json!({"bos_token": "<b>", "enable_thinking": false})).unwrap(), "<b>FalseTrue");
        assert!(rendered(json!({"messages": []})).unwrap_err().contains("messages"));
    }
}
