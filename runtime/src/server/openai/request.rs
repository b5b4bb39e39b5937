//! What OpenAI's clients send.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::engine::Task;
use crate::sampling::{Adjustments, SamplingParams};
use crate::server::Call;
use crate::server::error::ApiError;
use crate::server::generation::Plan;
use crate::server::text::PromptRequest;
use crate::server::tgi::{OneOrMany, logit_bias};

/// OpenAI's own limit, where the server's is lower.
const TOP_LOGPROBS: usize = 20;

/// What both routes take.
#[derive(Deserialize)]
pub struct Common {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    typical_p: Option<f32>,
    n: Option<usize>,
    best_of: Option<usize>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
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
    response_format: Option<ResponseFormat>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

#[derive(Deserialize)]
struct ResponseFormat {
    r#type: String,
}

#[derive(Deserialize)]
pub struct CompletionRequest {
    pub prompt: Prompts,
    pub echo: Option<bool>,
    pub logprobs: Option<usize>,
    suffix: Option<String>,
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

impl CompletionRequest {
    /// Refuses what would otherwise be ignored.
    pub fn check(&self) -> Result<(), ApiError> {
        match self.suffix.as_deref() {
            None | Some("") => Ok(()),
            Some(_) => Err(ApiError::validation("suffix: not supported")),
        }
    }
}

impl ChatRequest {
    /// Refuses what would otherwise be ignored.
    pub fn check(&self) -> Result<(), ApiError> {
        if let Some(ResponseFormat { r#type }) = &self.response_format
            && r#type != "text"
        {
            let message = format!("response_format: expected text, got {type}", type = r#type);
            return Err(ApiError::validation(message));
        }
        match self.tool_choice.as_ref() {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(choice)) if choice == "auto" || choice == "none" => Ok(()),
            Some(_) => Err(ApiError::validation("tool_choice: expected auto or none")),
        }
    }

    /// The conversation as the model's template writes it.
    pub fn render(&self, call: &Call) -> Result<String, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::validation("messages: expected at least one, got none"));
        }
        let unwanted = self.tool_choice.as_ref().is_some_and(|choice| choice == "none");
        let tools = self.tools.as_ref().filter(|_| !unwanted);
        let request = PromptRequest {
            messages: &self.messages,
            tools,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &Map::new(),
        };
        call.text.render(&request).map_err(ApiError::validation)
    }
}

impl Common {
    /// The plan for one prompt, within the limits.
    pub fn plan(
        &self,
        call: &Call,
        prompt: Vec<u32>,
        top_n: usize,
        default_tokens: Option<usize>,
    ) -> Result<Plan, ApiError> {
        let limit = call.limits.max_top_n_tokens.max(TOP_LOGPROBS);
        if top_n > limit {
            return Err(ApiError::validation(format!("top_logprobs: expected at most {limit}, got {top_n}")));
        }
        let asked = self.max_completion_tokens.or(self.max_tokens).or(default_tokens);
        let task = Task {
            max_new_tokens: call.new_tokens(asked, prompt.len(), "max_tokens")?,
            prompt,
            eos_token_ids: call.eos_token_ids.clone(),
            sampling: SamplingParams {
                temperature: self.temperature.unwrap_or(1.0),
                top_p: self.top_p.unwrap_or(1.0),
                top_k: self.top_k.unwrap_or(0),
                repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
                seed: self.seed.map_or_else(crate::server::clock_seed, |seed| seed as u64),
            },
            adjustments: Adjustments {
                typical_p: self.typical_p.unwrap_or(1.0),
                frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
                presence_penalty: self.presence_penalty.unwrap_or(0.0),
                logit_bias: logit_bias(self.logit_bias.as_ref())?,
            },
            top_n,
            prompt_logprobs: false,
        };
        call.checked(Plan { task, stop: self.stop.clone().map(OneOrMany::list).unwrap_or_default() })
    }

    /// Answers to a prompt, and answers of which these are the likeliest.
    pub fn samples(&self, call: &Call) -> Result<(usize, usize), ApiError> {
        let n = self.n.unwrap_or(1);
        let best_of = self.best_of.unwrap_or(n);
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
