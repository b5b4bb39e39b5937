//! Messages as the template wants them, and the message that an answer goes on with.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Stands behind the text that an answer goes on with, to find its end in the prompt. The blank tells whether the
/// template has cut blanks there.
const END: &str = "END_OF_THE_MESSAGE_TO_CONTINUE ";

fn refused<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Conversation(message.into()))
}

/// A copy of the message. Content in parts stays as it is where the template goes through them; else the texts
/// are joined by a line end.
///
/// # Errors
/// [`Error::Conversation`] where it is no object, or has parts that are no text.
pub(super) fn prepared(message: &Value, iterates: bool) -> Result<Map<String, Value>> {
    let Some(message) = message.as_object() else {
        return refused("messages: expected objects with `role` and `content`");
    };
    let mut message = message.clone();
    if let Some(Value::Array(parts)) = message.get("content") {
        let texts = parts.iter().map(|part| text_of(part, iterates)).collect::<Result<Vec<_>>>()?;
        if !iterates {
            message.insert("content".into(), texts.join("\n").into());
        }
    }
    Ok(message)
}

/// The text of a part; a template that goes through them may know parts of further kinds.
fn text_of(part: &Value, iterates: bool) -> Result<&str> {
    let kind = part["type"].as_str().unwrap_or("text");
    let medium = ["image", "audio", "video", "file"].iter().any(|medium| kind.contains(medium));
    match part.as_str().or(part["text"].as_str()) {
        Some(text) if !medium => Ok(text),
        None if !medium && iterates => Ok(""),
        None if kind == "text" => refused("content: expected parts with a `text`"),
        _ => refused(format!("{kind} parts are not supported")),
    }
}

/// Marks the end of the last message's text, which it returns.
///
/// # Errors
/// [`Error::Conversation`] where there is no such text.
pub(super) fn mark_end(messages: &mut [Map<String, Value>]) -> Result<String> {
    let Some(last) = messages.last_mut() else {
        return refused("continue_final_message: expected a message, got none");
    };
    let text = match last.get_mut("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let Some(text) = text else {
        return refused("continue_final_message: expected a text in the last message, got none");
    };
    let unmarked = text.clone();
    *text += END;
    Ok(unmarked)
}

/// The prompt up to the mark. Where the template cut blanks behind it, it cut them from the text too.
///
/// # Errors
/// [`Error::Conversation`] where the template did not write the text.
pub(super) fn cut_at_end(mut prompt: String, text: &str) -> Result<String> {
    let mark = END.trim();
    let Some(at) = prompt.rfind(mark).filter(|_| prompt.contains(text.trim())) else {
        return refused("continue_final_message: the chat template does not write the last message as it is");
    };
    let cut = !prompt[at..].starts_with(END);
    prompt.truncate(at);
    if cut {
        prompt.truncate(prompt.trim_end_matches(super::python::blank).len());
    }
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn content(message: Value, iterates: bool) -> Result<Value, String> {
        let prepared = prepared(&message, iterates).map_err(|error| error.to_string())?;
        Ok(prepared["content"].clone())
    }

    #[test]
    fn texts_are_joined_for_templates_that_do_not_go_through_parts() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}, "c"]);
        let message = json!({"role": "user", "content": parts});
        assert_eq!(content(message.clone(), false).unwrap(), "a\nb\n\nc");
        assert_eq!(content(message, true).unwrap(), parts);
        assert_eq!(content(json!({"role": "assistant", "content": null}), false).unwrap(), Value::Null);
    }

    #[test]
    fn parts_that_are_no_text_are_refused_by_name_and_not_dropped() {
        for (part, iterates, error) in [
            (
                json!({"type": "image_url", "image_url": {"url": "x"}}),
                true,
                "image_url parts are not supported",
            ),
            (
                json!({"type": "image_url", "image_url": {"url": "x"}}),
                false,
                "image_url parts are not supported",
            ),
            (json!({"type": "input_audio", "text": "x"}), true, "input_audio parts are not supported"),
            (json!({"type": "thinking", "thinking": "x"}), false, "thinking parts are not supported"),
            (json!({"type": "text"}), false, "content: expected parts with a `text`"),
        ] {
            assert_eq!(content(json!({"role": "user", "content": [part]}), iterates).unwrap_err(), error);
        }
        assert!(content(json!("Hi"), false).unwrap_err().starts_with("messages: expected objects"));
    }
}
