//! What the server needs of text. The command line supplies it, so this crate needs no tokenizer.

use serde_json::{Map, Value};

/// A conversation as it was sent, and how the model's chat template is to render it.
#[derive(Clone, Copy, Debug)]
pub struct PromptRequest<'a> {
    /// Objects with all the fields that they came with.
    pub messages: &'a [Value],
    /// Descriptions of functions, in the order given.
    pub tools: Option<&'a Value>,
    /// Ends the prompt with the start of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends the prompt where the last message does, so that the answer goes on with it. Never together with
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// More variables of the template, which win over the others.
    pub kwargs: &'a Map<String, Value>,
}

/// A token and the characters that it covers.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Span {
    pub id: u32,
    pub text: String,
    pub start: usize,
    pub stop: usize,
}

/// Tokenizer and chat template of the served model. Errors are one line for the client.
pub trait TextCodec: Send + Sync + 'static {
    /// Ids of a text; `add_special` adds what the model expects around one.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, String>;

    /// Ids with their places in the text, counted in characters; `add_special` as for `encode`.
    fn spans(&self, text: &str, add_special: bool) -> Result<Vec<Span>, String>;

    /// Bytes of text that the longest token covers: a text of more bytes has more than one token.
    fn longest_token(&self) -> usize;

    /// The text of a conversation. Encode it without adding special tokens: the template has brought them.
    fn render(&self, request: &PromptRequest) -> Result<String, String>;

    /// The source of the chat template that a conversation with or without tools takes.
    fn template_source(&self, with_tools: bool) -> Option<&str>;

    /// Ids that end the assistant's turn.
    fn end_of_turn(&self) -> Vec<u32>;

    fn is_special(&self, id: u32) -> bool;

    /// The text of one id, as far as it is one.
    fn token_text(&self, id: u32) -> String;

    /// A decoder for a growing sequence. Special tokens have no text, but for those named in `kept`.
    fn pieces_keeping(&self, kept: &[&str]) -> Box<dyn Pieces>;

    /// A decoder for a growing sequence, without special tokens.
    fn pieces(&self) -> Box<dyn Pieces> {
        self.pieces_keeping(&[])
    }
}

/// Generated ids to text. Only whole characters come out.
pub trait Pieces: Send {
    fn push(&mut self, id: u32) -> Result<String, String>;

    /// What still waits.
    fn finish(&mut self) -> Result<String, String>;
}
