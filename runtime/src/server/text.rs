//! What the server needs of text. The command line supplies it, so this crate needs no tokenizer.

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
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

    /// Ids with their places in the text, counted in characters.
    fn spans(&self, text: &str) -> Result<Vec<Span>, String>;

    /// The text of a conversation up to the assistant's turn.
    fn render(&self, messages: &[ChatMessage], tools: Option<&serde_json::Value>) -> Result<String, String>;

    /// Ids that end the assistant's turn.
    fn end_of_turn(&self) -> Vec<u32>;

    fn is_special(&self, id: u32) -> bool;

    /// The text of one id, as far as it is one.
    fn token_text(&self, id: u32) -> String;

    /// A decoder for a growing sequence.
    fn pieces(&self) -> Box<dyn Pieces>;
}

/// Generated ids to text. Only whole characters come out.
pub trait Pieces: Send {
    fn push(&mut self, id: u32) -> Result<String, String>;

    /// What still waits.
    fn finish(&mut self) -> Result<String, String>;
}
