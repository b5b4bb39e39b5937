//! What a chat template is given.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

static NOTHING: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

/// A conversation as it was sent, and how the template is to render it.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with all the fields that they came with: `role`, `content` (a text or a list of parts), `tool_calls`
    /// and whatever else a template may know.
    pub messages: &'a [Value],
    /// Descriptions of functions, in the order given.
    pub tools: Option<&'a Value>,
    /// Ends the text with the start of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends the text where the last message does, so that an answer goes on with it.
    pub continue_final_message: bool,
    /// More variables of the template. They win over those of the same name that it would have otherwise.
    pub kwargs: &'a Map<String, Value>,
}

impl<'a> Conversation<'a> {
    /// Up to the start of the assistant's turn, without tools or further variables.
    pub fn new(messages: &'a [Value]) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &NOTHING,
        }
    }
}

/// A message of text.
pub fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}
