//! Calls of functions in an answer, as OpenAI's clients get them.

use serde_json::{Value, json};

use super::tool_calls::{Piece, ToolCallParser, ToolFormat};
use crate::access;

/// The calls and the text of one choice, as they come.
pub struct Calls {
    parser: ToolCallParser,
    count: usize,
}

/// What a piece of an answer turned out to be.
pub struct Found {
    pub text: String,
    pub calls: Vec<Value>,
}

impl Calls {
    pub fn new(format: ToolFormat) -> Self {
        Self { parser: ToolCallParser::new(format), count: 0 }
    }

    /// Takes the next piece of the answer; after the last one nothing is held back.
    pub fn push(&mut self, piece: &str, last: bool) -> Found {
        let mut pieces = self.parser.push(piece);
        if last {
            pieces.extend(self.parser.finish());
        }
        let mut found = Found { text: String::new(), calls: Vec::new() };
        for piece in pieces {
            match piece {
                Piece::Text(text) => found.text += &text,
                Piece::Call { name, arguments } => {
                    found.calls.push(json!({"index": self.count, "id": format!("call_{}", access::new_id()),
                        "type": "function", "function": {"name": name, "arguments": arguments}}));
                    self.count += 1;
                }
            }
        }
        found
    }

    /// Why the answer ended, for a client that waits for calls.
    pub fn finish_reason(&self, reason: &'static str) -> &'static str {
        if self.count > 0 && reason == "stop" { "tool_calls" } else { reason }
    }
}

impl Found {
    /// The content of a whole message: null where there are calls alone.
    pub fn content(&self) -> Value {
        if self.text.is_empty() && !self.calls.is_empty() { Value::Null } else { json!(self.text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n\
        </tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn calls_have_an_index_an_id_and_arguments_as_a_text_whole_or_in_pieces() {
        for size in [1, 7, ANSWER.len()] {
            let mut calls = Calls::new(ToolFormat::Hermes);
            let (mut text, mut all) = (String::new(), Vec::new());
            let pieces: Vec<_> = ANSWER.as_bytes().chunks(size).collect();
            for (i, piece) in pieces.iter().enumerate() {
                let found = calls.push(std::str::from_utf8(piece).unwrap(), i + 1 == pieces.len());
                text += &found.text;
                all.extend(found.calls);
            }
            assert_eq!((text.trim_end(), all.len()), ("Let me see.", 2), "{size}");
            assert_eq!((&all[0]["index"], &all[1]["index"]), (&json!(0), &json!(1)));
            assert_ne!(all[0]["id"], all[1]["id"]);
            assert_eq!(all[0]["function"]["name"], "weather");
            let arguments: Value =
                serde_json::from_str(all[0]["function"]["arguments"].as_str().unwrap()).unwrap();
            assert_eq!(arguments, json!({"city": "Rome"}));
            assert_eq!(
                (calls.finish_reason("stop"), calls.finish_reason("length")),
                ("tool_calls", "length")
            );
        }
    }

    #[test]
    fn an_answer_without_calls_is_its_text() {
        let mut calls = Calls::new(ToolFormat::Hermes);
        let found = calls.push("Plain <b>text</b>", true);
        assert_eq!((found.content(), found.calls.len()), (json!("Plain <b>text</b>"), 0));
        assert_eq!(calls.finish_reason("stop"), "stop");
    }
}
