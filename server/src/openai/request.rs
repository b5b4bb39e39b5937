//! What OpenAI's clients send.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Call;
use crate::error::ApiError;
use crate::fields::shown;
use crate::generation::GenerationParams;
use crate::parameters::Parameters;
use crate::text::PromptRequest;

/// OpenAI's own limit, where the server's is lower.
const TOP_LOGPROBS: usize = 20;

/// What both routes take.
#[derive(Deserialize)]
pub struct Common {
    n: Option<usize>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    truncate_prompt_tokens: Option<i64>,
    pub add_special_tokens: Option<bool>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    parameters: Parameters,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
pub struct ChatRequest {
    messages: Vec<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    documents: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

#[derive(Deserialize)]
pub struct CompletionRequest {
    pub prompt: Prompts,
    pub echo: Option<bool>,
    pub logprobs: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

/// One prompt or several, each a text or its tokens.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompts {
    pub fn list(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Ids(ids) => vec![Prompt::Ids(ids)],
            Self::ManyIds(many) => many.into_iter().map(Prompt::Ids).collect(),
        }
    }
}

impl ChatRequest {
    /// The functions that the answer may call.
    pub fn tools(&self) -> Result<Option<&Value>, ApiError> {
        let wanted = match self.tool_choice.as_ref() {
            None | Some(Value::Null) => true,
            Some(Value::String(choice)) if choice == "auto" => true,
            Some(Value::String(choice)) if choice == "none" => false,
            Some(_) => return Err(ApiError::validation("tool_choice: expected auto or none")),
        };
        let some = |tools: &&Value| tools.as_array().is_none_or(|tools| !tools.is_empty());
        Ok(self.tools.as_ref().filter(|tools| wanted && some(tools)))
    }

    /// The conversation as the model's template writes it.
    pub fn render(&self, call: &Call) -> Result<String, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::validation("messages: expected at least one, got none"));
        }
        if let Some(other) = self.messages.iter().find(|message| !message.is_object()) {
            let message = format!("messages: expected objects, got {}", shown(Some(other)));
            return Err(ApiError::validation(message));
        }
        let continues = self.continue_final_message.unwrap_or(false);
        // A request that continues a message begins no new one, whether or not it says so.
        let begins = self.add_generation_prompt.unwrap_or(!continues);
        if continues && begins {
            let message =
                "continue_final_message: expected false together with add_generation_prompt, got true";
            return Err(ApiError::validation(message));
        }
        let mut kwargs = self.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(documents) = &self.documents {
            kwargs.entry("documents").or_insert_with(|| documents.clone());
        }
        let request = PromptRequest {
            messages: &self.messages,
            tools: self.tools()?,
            add_generation_prompt: begins,
            continue_final_message: continues,
            kwargs: &kwargs,
        };
        call.text.render(&request).map_err(ApiError::validation)
    }
}

impl Common {
    /// Ids of a prompt; `add_special` where the request does not say whether to add them.
    pub fn encode(&self, call: &Call, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let add_special = self.add_special_tokens.unwrap_or(add_special);
        match self.truncates() {
            true => call.encode_end(text, add_special, self.kept(call)?),
            false => call.encode(text, add_special),
        }
    }

    /// Whether only the end of a prompt is wanted.
    pub fn truncates(&self) -> bool {
        self.truncate_prompt_tokens.is_some()
    }

    /// The plan for one prompt, within the limits. `end_of_turn` ends the text beside the model's own ends. Where the
    /// prompt is part of the answer (`echoes`), it may be all of it.
    pub fn plan(
        &self,
        call: &Call,
        mut prompt: Vec<u32>,
        (default_tokens, echoes): (Option<usize>, bool),
        end_of_turn: &[u32],
    ) -> Result<GenerationParams, ApiError> {
        prompt.drain(..prompt.len().saturating_sub(self.kept(call)?));
        let asked = self.max_completion_tokens.or(self.max_tokens).or(default_tokens);
        let only_echoes = asked == Some(0) && echoes;
        let asked = if only_echoes { Some(1) } else { asked };
        let new_tokens = call.new_tokens(asked, prompt.len(), "max_tokens")?;
        let new_tokens = if only_echoes { 0 } else { new_tokens };
        self.parameters.plan(call, prompt, new_tokens, self.temperature(call), end_of_turn)
    }

    /// OpenAI draws at 1 where nothing is said; a model may want to be asked otherwise.
    fn temperature(&self, call: &Call) -> f32 {
        let defaults = &call.defaults;
        let default = if defaults.do_sample == Some(false) { Some(0.0) } else { defaults.temperature };
        self.parameters.temperature.or(default).unwrap_or(1.0)
    }

    /// The last tokens of a prompt that are kept; -1 is as many as there may be.
    fn kept(&self, call: &Call) -> Result<usize, ApiError> {
        match self.truncate_prompt_tokens {
            None => Ok(usize::MAX),
            Some(-1) => Ok(call.limits.max_input_tokens),
            Some(keep @ 1..) => Ok(usize::try_from(keep).unwrap_or(usize::MAX)),
            Some(keep) => {
                let message = format!("truncate_prompt_tokens: expected -1, or 1 or more, got {keep}");
                Err(ApiError::validation(message))
            }
        }
    }

    /// Answers to a prompt, and answers of which these are the likeliest.
    pub fn samples(&self, call: &Call) -> Result<(usize, usize), ApiError> {
        let n = self.n.unwrap_or(1);
        let best_of = self.parameters.best_of.unwrap_or(n);
        let limit = call.limits.max_best_of;
        if n == 0 || n > limit {
            return Err(ApiError::validation(format!("n: expected 1 to {limit}, got {n}")));
        }
        if best_of < n || best_of > limit {
            return Err(ApiError::validation(format!("best_of: expected {n} to {limit}, got {best_of}")));
        }
        if best_of > n && self.stream == Some(true) {
            return Err(ApiError::validation(format!("best_of: expected {n} for a stream, got {best_of}")));
        }
        Ok((n, best_of))
    }

    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|options| options.include_usage)
    }
}

/// The alternatives that may be asked for.
pub fn alternatives(call: &Call, asked: usize, name: &str) -> Result<usize, ApiError> {
    let limit = call.limits.max_top_n_tokens.max(TOP_LOGPROBS);
    match asked > limit {
        true => Err(ApiError::validation(format!("{name}: expected at most {limit}, got {asked}"))),
        false => Ok(asked),
    }
}
