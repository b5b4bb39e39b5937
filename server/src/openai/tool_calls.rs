//! Tool calls in what a model writes. Models were trained on a few ways to write them; which one, the chat template
//! tells. Nothing is lost: what only looks like a call comes out as text.

use serde_json::{Deserializer, Map, Value};

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and Qwen.
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, or behind `<|python_tag|>`; several with `;` between.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, `[TOOL_CALLS]name{…}` or `[TOOL_CALLS]name[ARGS]{…}`.
    Mistral,
}

const CLOSE: &str = "</tool_call>";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

impl ToolFormat {
    /// The format that a chat template asks for or shows; `None` where it is another one, or there are no tools.
    pub fn of_template(source: &str) -> Option<Self> {
        let has = |marker: &str| source.contains(marker);
        match () {
            // The same tags around other languages.
            () if has("<tool_call>") && (has("<function=") || has("<arg_key>")) => None,
            () if has("<tool_call>") => Some(Self::Hermes),
            () if has("[TOOL_CALLS]") => Some(Self::Mistral),
            () if has("<|python_tag|>") => Some(Self::Llama),
            () if has("<|start_header_id|>") && has("\"parameters\"") => Some(Self::Llama),
            () => None,
        }
    }

    /// What marks a call, its beginning first. These may be special tokens: the text to be parsed must keep them.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", CLOSE],
            Self::Llama => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]", CALL_ID, ARGUMENTS],
        }
    }

    fn marker(self) -> &'static str {
        self.markers()[0]
    }
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    /// `arguments` is JSON.
    Call {
        name: String,
        arguments: String,
    },
}

/// Finds the calls in an answer that comes in pieces of any size. Text that may become a call waits until that is
/// clear; blanks around calls are dropped.
#[derive(Debug)]
pub struct ToolCallParser {
    format: ToolFormat,
    /// What is not decided yet.
    buffer: String,
    /// Nothing but blanks has come since the beginning, or the last call.
    blank: bool,
    /// Blanks that are text only if more text follows.
    blanks: String,
    called: bool,
}

/// What the text from a possible beginning on turns out to be.
enum Outcome {
    /// More is needed to tell.
    Open,
    Text,
    /// Calls, and how many bytes they take.
    Calls(Vec<Piece>, usize),
}

impl ToolCallParser {
    pub fn new(format: ToolFormat) -> Self {
        Self { format, buffer: String::new(), blank: true, blanks: String::new(), called: false }
    }

    /// Takes the next piece of the answer, and gives what is clear by now.
    pub fn push(&mut self, piece: &str) -> Vec<Piece> {
        self.buffer += piece;
        self.advance(false)
    }

    /// What is left at the answer's end.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = self.advance(true);
        if !self.called && !self.blanks.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut self.blanks)));
        }
        pieces
    }

    fn advance(&mut self, ended: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while !self.buffer.is_empty() {
            let start = self.beginning(ended);
            self.text(start, &mut pieces);
            if self.buffer.is_empty() {
                break;
            }
            match self.outcome(ended) {
                Outcome::Open if !ended => break,
                Outcome::Open | Outcome::Text => {
                    let first = self.first_of_candidate();
                    self.text(first, &mut pieces);
                }
                Outcome::Calls(calls, length) => {
                    pieces.extend(calls);
                    self.buffer.drain(..length);
                    self.blanks.clear();
                    (self.blank, self.called) = (true, true);
                }
            }
        }
        pieces
    }

    /// Gives the first bytes of the buffer as text.
    fn text(&mut self, length: usize, pieces: &mut Vec<Piece>) {
        let text: String = self.buffer.drain(..length).collect();
        if self.blank && text.trim().is_empty() {
            self.blanks += &text;
        } else if !text.is_empty() {
            self.blank = false;
            let text = std::mem::take(&mut self.blanks) + &text;
            match pieces.last_mut() {
                Some(Piece::Text(before)) => *before += &text,
                _ => pieces.push(Piece::Text(text)),
            }
        }
    }

    /// Where a call, or the beginning of a marker, may begin.
    fn beginning(&self, ended: bool) -> usize {
        let (text, marker) = (self.buffer.as_str(), self.format.marker());
        let bare = text.len() - text.trim_start().len();
        if self.format == ToolFormat::Llama && self.blank && text[bare..].starts_with(self.bare_beginning()) {
            return bare;
        }
        let partial = |at: &usize| marker.starts_with(&text[*at..]);
        let begun = || text.char_indices().map(|(at, _)| at).rev().take(marker.len()).filter(partial).last();
        text.find(marker).or_else(|| begun().filter(|_| !ended)).unwrap_or(text.len())
    }

    /// What a call of Llama's begins with where there is no marker, at the beginning and behind another call.
    fn bare_beginning(&self) -> char {
        if self.called { ';' } else { '{' }
    }

    /// Bytes that are text for sure once a candidate is none.
    fn first_of_candidate(&self) -> usize {
        let marker = self.format.marker();
        if self.buffer.starts_with(marker) {
            marker.len()
        } else {
            self.buffer.chars().next().map_or(0, char::len_utf8)
        }
    }

    /// What the buffer begins with.
    fn outcome(&self, ended: bool) -> Outcome {
        let marker = self.format.marker();
        let inner = match (self.format, self.buffer.strip_prefix(marker)) {
            (_, Some(inner)) => inner,
            (ToolFormat::Llama, None) if self.buffer.starts_with(['{', ';']) => {
                self.buffer.strip_prefix(';').unwrap_or(&self.buffer)
            }
            _ => return Outcome::Open,
        };
        let inner = inner.trim_start();
        let taken = self.buffer.len() - inner.len();
        if inner.is_empty() {
            return Outcome::Open;
        }
        let outcome = match self.format {
            ToolFormat::Hermes => hermes(inner, ended),
            ToolFormat::Llama => llama(inner),
            ToolFormat::Mistral => mistral(inner),
        };
        match outcome {
            Outcome::Calls(calls, length) => Outcome::Calls(calls, taken + length),
            other => other,
        }
    }
}

/// The JSON value at the beginning of a text, and its length.
fn json(text: &str) -> Result<(Value, usize), Outcome> {
    let mut values = Deserializer::from_str(text).into_iter::<Value>();
    match values.next() {
        Some(Ok(value)) => Ok((value, values.byte_offset())),
        Some(Err(error)) if !error.is_eof() => Err(Outcome::Text),
        _ => Err(Outcome::Open),
    }
}

/// An object with a name, and arguments or parameters: an object, or its JSON as a text.
fn call(object: &Value) -> Option<Piece> {
    let name = object.get("name")?.as_str()?.to_owned();
    let arguments = match object.get("arguments").or_else(|| object.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => {
            serde_json::from_str::<Map<String, Value>>(text).ok()?;
            text.clone()
        }
        Some(arguments) => arguments.is_object().then(|| arguments.to_string())?,
    };
    Some(Piece::Call { name, arguments })
}

fn hermes(text: &str, ended: bool) -> Outcome {
    if !text.starts_with('{') {
        return Outcome::Text;
    }
    let (object, length) = match json(text) {
        Ok(found) => found,
        Err(outcome) => return outcome,
    };
    let rest = text[length..].trim_start();
    let behind = text.len() - rest.len();
    match call(&object) {
        None => Outcome::Text,
        Some(call) if rest.starts_with(CLOSE) => Outcome::Calls(vec![call], behind + CLOSE.len()),
        // The end of a turn may come in place of the tag.
        Some(call) if ended && rest.is_empty() => Outcome::Calls(vec![call], text.len()),
        Some(_) if CLOSE.starts_with(rest) => Outcome::Open,
        Some(_) => Outcome::Text,
    }
}

fn llama(text: &str) -> Outcome {
    if !text.starts_with('{') {
        return Outcome::Text;
    }
    match json(text) {
        Ok((object, length)) => {
            let has_arguments = object.get("parameters").or_else(|| object.get("arguments")).is_some();
            call(&object)
                .filter(|_| has_arguments)
                .map_or(Outcome::Text, |call| Outcome::Calls(vec![call], length))
        }
        Err(outcome) => outcome,
    }
}

fn mistral(text: &str) -> Outcome {
    if text.starts_with(['[', '{']) {
        return match json(text) {
            Ok((Value::Array(objects), length)) => {
                let calls: Option<Vec<_>> = objects.iter().map(call).collect();
                calls.filter(|it| !it.is_empty()).map_or(Outcome::Text, |it| Outcome::Calls(it, length))
            }
            Ok((object, length)) => {
                call(&object).map_or(Outcome::Text, |it| Outcome::Calls(vec![it], length))
            }
            Err(outcome) => outcome,
        };
    }
    let named = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    let name = &text[..text.find(|c| !named(c)).unwrap_or(text.len())];
    let mut rest = text[name.len()..].trim_start();
    for marker in [CALL_ID, ARGUMENTS] {
        if let Some(behind) = rest.strip_prefix(marker) {
            let id = if marker == CALL_ID { behind.find(|c| !named(c)).unwrap_or(behind.len()) } else { 0 };
            rest = behind[id..].trim_start();
        }
    }
    match rest {
        _ if name.is_empty() => Outcome::Text,
        "" => Outcome::Open,
        _ if CALL_ID.starts_with(rest) || ARGUMENTS.starts_with(rest) => Outcome::Open,
        _ if !rest.starts_with('{') => Outcome::Text,
        _ => match json(rest) {
            Ok((arguments, length)) => {
                let call = Piece::Call { name: name.to_owned(), arguments: arguments.to_string() };
                Outcome::Calls(vec![call], text.len() - rest.len() + length)
            }
            Err(outcome) => outcome,
        },
    }
}

#[cfg(test)]
mod tests;
