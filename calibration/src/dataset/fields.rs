//! Which fields of a row hold its text, and how they become text.

use serde_json::{Map, Value, json};

/// Writes a conversation (messages with `role` and `content`) as the model was trained to read it.
pub type Render = dyn Fn(&[Value]) -> gptq_text::Result<String>;

/// What is read of each row. It is chosen once for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// A string.
    Text(String),
    /// A list of messages, for the model's chat template.
    Conversation(String),
    /// `instruction`, perhaps `input`, and `output`: a conversation of two turns.
    Instruction,
}

impl Field {
    /// The field asked for, else the first that is there of `text`, `messages`, `conversations` and the pair
    /// `instruction` and `output`. `names` says of each field of the file whether it holds a list.
    pub(super) fn choose(names: &[(String, bool)], asked: Option<&str>) -> Result<Self, String> {
        let find = |wanted: &str| names.iter().find(|(name, _)| name == wanted);
        let field = |(name, is_list): &(String, bool)| match is_list {
            true => Self::Conversation(name.clone()),
            false => Self::Text(name.clone()),
        };
        let found = match asked {
            Some(name) => find(name).map(field),
            None => {
                ["text", "messages", "conversations"].into_iter().find_map(find).map(field).or_else(|| {
                    (find("instruction").is_some() && find("output").is_some()).then_some(Self::Instruction)
                })
            }
        };
        found.ok_or_else(|| {
            let listed = names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let way = if asked.is_some() { "expected one of them" } else { "choose one with --text-field" };
            format!("no field `{}`; the fields are {listed}: {way}", asked.unwrap_or("text"))
        })
    }

    /// The names of what is read.
    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Self::Text(name) | Self::Conversation(name) => vec![name],
            Self::Instruction => vec!["system", "instruction", "input", "output"],
        }
    }

    /// The text of one row; the error says what is wrong with it.
    pub(super) fn text(&self, row: &mut Map<String, Value>, render: &Render) -> Result<String, String> {
        match self {
            Self::Text(name) => match row.remove(name) {
                Some(Value::String(text)) => Ok(text),
                Some(_) => Err(format!("the field `{name}` is not a string")),
                None => Err(format!("no field `{name}`, which earlier rows have")),
            },
            Self::Conversation(name) => match row.remove(name) {
                Some(Value::Array(messages)) if !messages.is_empty() => {
                    let messages = messages.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
                    render(&messages).map_err(|cause| cause.to_string())
                }
                Some(_) => Err(format!("the field `{name}` is not a list of messages")),
                None => Err(format!("no field `{name}`, which earlier rows have")),
            },
            Self::Instruction => instruction(row, render),
        }
    }
}

/// A row of the Alpaca kind. Models without a chat template get its parts as paragraphs.
fn instruction(row: &mut Map<String, Value>, render: &Render) -> Result<String, String> {
    let mut part = |name: &str| match row.remove(name) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) if matches!(name, "system" | "input") => Ok(String::new()),
        Some(_) => Err(format!("the field `{name}` is not a string")),
        None => Err(format!("no field `{name}`, which earlier rows have")),
    };
    let (system, output) = (part("system")?, part("output")?);
    let asked = [part("instruction")?, part("input")?];
    let user =
        asked.iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("\n\n");
    let turns = [("system", system), ("user", user), ("assistant", output)];
    let turns = || turns.iter().filter(|(role, content)| *role != "system" || !content.is_empty());
    let messages: Vec<Value> =
        turns().map(|(role, content)| json!({"role": role, "content": content})).collect();
    match render(&messages) {
        Err(gptq_text::Error::NoChatTemplate { .. }) => {
            Ok(turns().map(|(_, content)| content.as_str()).collect::<Vec<_>>().join("\n\n"))
        }
        rendered => rendered.map_err(|cause| cause.to_string()),
    }
}

/// A message with `role` and `content`, as it is or from ShareGPT's `from` and `value`.
fn message(message: Value) -> Result<Value, String> {
    let Value::Object(mut fields) = message else {
        return Err("a message is not an object with `role` and `content`".to_owned());
    };
    if fields.contains_key("role") {
        return Ok(Value::Object(fields));
    }
    let (Some(Value::String(from)), Some(value)) = (fields.remove("from"), fields.remove("value")) else {
        return Err("a message has neither `role` and `content` nor `from` and `value`".to_owned());
    };
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        _ => return Err(format!("a message is from `{from}`: expected system, human, gpt or tool")),
    };
    Ok(json!({"role": role, "content": value}))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `user:Hi|assistant:Hello|`
    fn render(messages: &[Value]) -> gptq_text::Result<String> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Ok(messages.iter().map(|m| text(&m["role"]) + ":" + &text(&m["content"]) + "|").collect())
    }

    fn no_template(_: &[Value]) -> gptq_text::Result<String> {
        Err(gptq_text::Error::NoChatTemplate { at: "model".into() })
    }

    fn row(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn chosen(value: Value, asked: Option<&str>) -> Result<Field, String> {
        let names: Vec<_> = row(value).iter().map(|(name, value)| (name.clone(), value.is_array())).collect();
        Field::choose(&names, asked)
    }

    #[test]
    fn the_field_is_the_one_asked_for_or_the_usual_one() {
        let text = |name: &str| Ok(Field::Text(name.into()));
        assert_eq!(chosen(json!({"id": 1, "text": "a", "messages": []}), None), text("text"));
        assert_eq!(chosen(json!({"text": "a", "body": "b"}), Some("body")), text("body"));
        assert_eq!(chosen(json!({"chat": []}), Some("chat")), Ok(Field::Conversation("chat".into())));
        assert_eq!(chosen(json!({"output": "a", "instruction": "b"}), None), Ok(Field::Instruction));
        let error = chosen(json!({"id": 1, "body": "b"}), None).unwrap_err();
        assert_eq!(error, "no field `text`; the fields are id, body: choose one with --text-field");
        let error = chosen(json!({"id": 1, "body": "b"}), Some("text2")).unwrap_err();
        assert_eq!(error, "no field `text2`; the fields are id, body: expected one of them");
    }

    #[test]
    fn conversations_of_both_kinds_reach_the_template() {
        let messages = Field::Conversation("messages".into());
        for turns in [
            json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]),
            json!([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]),
        ] {
            let text = messages.text(&mut row(json!({"messages": turns})), &render);
            assert_eq!(text.unwrap(), "user:Hi|assistant:Hello|");
        }
        for turns in
            [json!([]), json!("Hi"), json!([{"from": "moon", "value": ""}]), json!(["Hi"]), json!([{}])]
        {
            assert!(messages.text(&mut row(json!({"messages": turns})), &render).is_err(), "{turns}");
        }
        let turns = json!({"messages": [{"role": "user", "content": "Hi"}]});
        assert!(messages.text(&mut row(turns), &no_template).unwrap_err().contains("no chat template"));
    }

    #[test]
    fn instructions_are_two_turns_or_paragraphs() {
        let mut whole = row(json!({"instruction": "Add.", "input": "1 2", "output": "3", "text": "no"}));
        let mut short = row(json!({"instruction": "Hi", "input": "", "output": "Hello"}));
        let text = |row: &mut _, render| Field::Instruction.text(row, render).unwrap();
        assert_eq!(text(&mut whole.clone(), &render), "user:Add.\n\n1 2|assistant:3|");
        assert_eq!(text(&mut short, &render), "user:Hi|assistant:Hello|");
        assert_eq!(text(&mut whole, &no_template), "Add.\n\n1 2\n\n3");
    }
}
