//! Every field of a request that the server knows: read, left out because answers do not depend on it, or refused. What
//! it does not know it refuses as well, since it may change the answer. `docs/serving.md` lists the same.

use gptq_input::short;
use serde_json::{Map, Value};

use super::error::ApiError;

/// What a request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/generate`, `/generate_stream`, `/` and `/tokenize`.
    Tgi,
    /// `/v1/chat/completions` and `/chat_tokenize`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// Where a field may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At the top of a request to TGI's routes.
    Top,
    /// In its `parameters`.
    Parameters,
    Chat,
    Completions,
}

use Place::{Chat, Completions, Parameters, Top};

const OPENAI: &[Place] = &[Chat, Completions];
const EVERYWHERE: &[Place] = &[Parameters, Chat, Completions];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Read,
    /// Answers do not depend on it.
    Ignored,
    /// Accepted where it asks for what is done anyway: this value, or null.
    Refused(Neutral),
}

/// A value that asks for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Neutral {
    Null,
    True,
    False,
    Zero,
    One,
    /// An empty text, list or object.
    Empty,
    /// This text, or a list of it alone.
    Text(&'static str),
    /// An object whose `type` is `text`.
    TypeText,
}

use Fate::{Ignored, Read, Refused};

struct Row(&'static [Place], Fate, &'static [&'static str]);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    Row(&[Top], Read, &["inputs", "parameters", "stream", "add_special_tokens"]),
    Row(&[Top], Ignored, &["model", "options"]),
    Row(
        EVERYWHERE,
        Read,
        &[
            "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "repetition_penalty", "frequency_penalty",
            "presence_penalty", "logit_bias", "stop", "stop_sequences", "stop_token_ids", "ignore_eos", "min_tokens",
            "min_new_tokens", "include_stop_str_in_output", "skip_special_tokens", "best_of",
        ],
    ),
    Row(
        &[Parameters],
        Read,
        &[
            "do_sample", "max_new_tokens", "return_full_text", "truncate", "details", "decoder_input_details",
            "top_n_tokens",
        ],
    ),
    Row(
        OPENAI,
        Read,
        &[
            "n", "max_tokens", "max_completion_tokens", "stream", "stream_options", "logprobs",
            "truncate_prompt_tokens", "add_special_tokens",
        ],
    ),
    Row(
        &[Chat],
        Read,
        &[
            "messages", "tools", "tool_choice", "documents", "top_logprobs", "chat_template_kwargs",
            "add_generation_prompt", "continue_final_message",
        ],
    ),
    Row(&[Completions], Read, &["prompt", "echo"]),
    Row(
        OPENAI,
        Ignored,
        &[
            "model", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "parallel_tool_calls", "prediction", "request_id", "priority", "cache_salt",
        ],
    ),
    Row(OPENAI, Refused(Neutral::TypeText), &["response_format"]),
    Row(&[Chat], Refused(Neutral::Text("text")), &["modalities"]),
    Row(&[Chat], Refused(Neutral::Text("none")), &["function_call"]),
    Row(
        EVERYWHERE,
        Refused(Neutral::Null),
        &[
            "grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
            "prompt_embeds", "json_schema", "regex", "ebnf", "allowed_token_ids", "max_time",
        ],
    ),
    Row(&[Chat], Refused(Neutral::Null), &["chat_template", "reasoning_effort", "verbosity", "audio"]),
    Row(OPENAI, Refused(Neutral::Null), &["web_search_options", "kv_transfer_params", "prompt_logprobs"]),
    Row(&[Parameters], Refused(Neutral::Null), &["adapter_id"]),
    Row(
        EVERYWHERE,
        Refused(Neutral::Empty),
        &["bad_words", "logits_processors", "mm_processor_kwargs", "vllm_xargs", "functions", "suffix"],
    ),
    Row(
        EVERYWHERE,
        Refused(Neutral::False),
        &[
            "watermark", "use_beam_search", "early_stopping", "return_tokens_as_token_ids", "return_token_ids",
            "add_vision_id",
        ],
    ),
    Row(&[Chat], Refused(Neutral::False), &["echo"]),
    Row(EVERYWHERE, Refused(Neutral::True), &["spaces_between_special_tokens", "detokenize"]),
    Row(
        EVERYWHERE,
        Refused(Neutral::One),
        &["length_penalty", "num_beams", "num_return_sequences", "guidance_scale", "tfs", "tfs_z"],
    ),
    Row(
        EVERYWHERE,
        Refused(Neutral::Zero),
        &[
            "no_repeat_ngram_size", "min_length", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_a", "mirostat",
            "mirostat_mode", "dry_multiplier", "xtc_probability", "dynatemp_range", "smoothing_factor",
        ],
    ),
];

/// Refuses a body with a field that would have to change the answer and does not. A body that is no object is refused
/// later, when it is read.
pub fn check(body: &[u8], route: Route) -> Result<(), ApiError> {
    let Ok(Value::Object(fields)) = serde_json::from_slice(body) else { return Ok(()) };
    match route {
        Route::Chat => check_at(&fields, Chat),
        Route::Completions => check_at(&fields, Completions),
        Route::Tgi => {
            check_at(&fields, Top)?;
            let Some(Value::Object(parameters)) = fields.get("parameters") else { return Ok(()) };
            check_at(parameters, Parameters)
        }
    }
}

fn check_at(fields: &Map<String, Value>, place: Place) -> Result<(), ApiError> {
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match fate(name, place) {
            Some(Read | Ignored) => {}
            Some(Refused(neutral)) if neutral.is(value) => {}
            Some(Refused(neutral)) => {
                let message =
                    format!("{name}: not supported, expected {}, got {}", neutral.said(), shown(Some(value)));
                return Err(ApiError::validation(message));
            }
            None => {
                let name = shown(Some(&Value::String(name.clone())));
                let message =
                    format!("{name}: no such field here; it might change the answer, so it is refused");
                return Err(ApiError::validation(message));
            }
        }
    }
    Ok(())
}

fn fate(name: &str, place: Place) -> Option<Fate> {
    let row = TABLE.iter().find(|Row(places, _, names)| places.contains(&place) && names.contains(&name));
    row.map(|Row(_, fate, _)| *fate)
}

impl Neutral {
    fn is(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Null, value) => value.is_null(),
            (Self::True | Self::False, value) => value.as_bool() == Some(self == Self::True),
            (Self::Zero, value) => value.as_f64() == Some(0.0),
            (Self::One, value) => value.as_f64() == Some(1.0),
            (Self::Empty, Value::String(text)) => text.is_empty(),
            (Self::Empty, Value::Array(values)) => values.is_empty(),
            (Self::Empty, Value::Object(fields)) => fields.is_empty(),
            (Self::Text(text), Value::Array(values)) => values.iter().all(|value| value == text),
            (Self::Text(text), value) => value == text,
            (Self::TypeText, value) => value["type"] == "text",
            (Self::Empty, _) => false,
        }
    }

    fn said(self) -> String {
        let said = match self {
            Self::Null => "nothing or null",
            Self::True => "true",
            Self::False => "false",
            Self::Zero => "0",
            Self::One => "1",
            Self::Empty => "nothing in it",
            Self::Text(text) => return format!("\"{text}\""),
            Self::TypeText => "the type text",
        };
        said.to_owned()
    }
}

/// A value on one line, long ones cut short.
pub fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), |value| short(&value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(route: Route, body: &Value) -> Option<String> {
        check(body.to_string().as_bytes(), route).err().map(|error| error.message)
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name_and_its_neutral_values_are_not() {
        for (name, changes, neutral) in [
            ("guided_json", json!({"type": "object"}), json!(null)),
            ("response_format", json!({"type": "json_object"}), json!({"type": "text"})),
            ("use_beam_search", json!(true), json!(false)),
            ("length_penalty", json!(2), json!(1.0)),
            ("no_repeat_ngram_size", json!(3), json!(0)),
            ("bad_words", json!(["x"]), json!([])),
            ("suffix", json!("x"), json!("")),
            ("modalities", json!(["audio"]), json!(["text"])),
            ("spaces_between_special_tokens", json!(false), json!(true)),
            ("brand_new_option", json!(0), json!(null)),
        ] {
            let message = refusal(Route::Chat, &json!({"messages": [], name: changes})).unwrap();
            assert!(message.contains(name), "{message}");
            assert_eq!(refusal(Route::Chat, &json!({"messages": [], name: neutral})), None, "{name}");
        }
        for (name, value) in
            [("watermark", json!(true)), ("adapter_id", json!("a")), ("max_tokens", json!(5))]
        {
            let body = json!({"inputs": "a", "parameters": {name: value}});
            assert!(refusal(Route::Tgi, &body).is_some_and(|message| message.contains(name)));
        }
        let misplaced = json!({"inputs": "a", "temperature": 0.5});
        assert!(refusal(Route::Tgi, &misplaced).is_some(), "a parameter outside of `parameters`");
        assert!(refusal(Route::Completions, &json!({"prompt": "a", "messages": []})).is_some());
    }

    #[test]
    fn what_answers_do_not_depend_on_is_accepted() {
        let body = json!({"model": "m", "user": "u", "metadata": {"a": 1}, "store": true, "service_tier": "auto",
            "parallel_tool_calls": false, "messages": []});
        assert_eq!(refusal(Route::Chat, &body), None);
        assert_eq!(refusal(Route::Tgi, &json!({"inputs": "a", "options": {"use_cache": false}})), None);
    }

    #[test]
    fn no_field_has_two_fates_in_one_place_and_all_are_documented() {
        let docs = include_str!("../../docs/serving.md");
        for place in [Top, Parameters, Chat, Completions] {
            let rows = TABLE.iter().filter(|Row(places, ..)| places.contains(&place));
            let mut names: Vec<_> = rows.flat_map(|Row(_, _, names)| names.iter()).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{place:?}");
            for name in names {
                assert!(
                    docs.contains(&format!("`{name}`")),
                    "docs/serving.md does not say what becomes of {name}"
                );
            }
        }
    }
}
