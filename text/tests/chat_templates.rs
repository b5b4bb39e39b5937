//! Prompts against those that `transformers` renders.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_text::chat::{ChatTemplate, Conversation};
use serde_json::{Map, Value, json};

fn template(source: &Value, tokens: &Value) -> ChatTemplate {
    let mut config = Map::new();
    config.insert("chat_template".into(), source.clone());
    let tokens = tokens.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
    config.extend(tokens.map(|(name, token)| (name.clone(), token.clone())));
    ChatTemplate::from_config(json!(config).to_string().as_bytes()).unwrap()
}

fn rendered(template: &ChatTemplate, case: &Value) -> Result<String, String> {
    let nothing = Map::new();
    let conversation = Conversation {
        messages: case["messages"].as_array().unwrap(),
        tools: Some(&case["tools"]),
        add_generation_prompt: case["add_generation_prompt"] == true,
        continue_final_message: case["continue_final_message"] == true,
        kwargs: case["kwargs"].as_object().unwrap_or(&nothing),
    };
    template.render(&conversation).map_err(|error| error.to_string())
}

/// The prompt byte for byte, or an error. What a template says by `raise_exception` is in ours too.
fn agrees(case: &Value, got: &Result<String, String>, source: &str) -> bool {
    match (case["prompt"].as_str(), case["error"].as_str(), got) {
        (Some(prompt), _, Ok(got)) => got == prompt,
        (_, Some(error), Err(got)) => got.contains(error) || !source.contains(error),
        // A date is in it.
        (None, None, Ok(got)) => case["dated"] == true && !got.is_empty(),
        _ => false,
    }
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
fn prompts_of_published_templates_are_those_of_transformers() {
    let shared = PathBuf::from(std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set"));
    let (mut templates, mut conversations, mut right) = (0, 0, 0);
    for entry in fs::read_dir(shared.join("golden/chat")).unwrap() {
        let path = entry.unwrap().path();
        let golden: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let template = template(&golden["template"], &golden);
        for case in golden["cases"].as_array().unwrap() {
            let got = rendered(&template, case);
            let agreed = agrees(case, &got, golden["template"].as_str().unwrap());
            if !agreed {
                eprintln!("{} {}: {got:?}", path.display(), case["case"]);
            }
            conversations += 1;
            right += usize::from(agreed);
        }
        templates += 1;
    }
    println!("{right} of {conversations} conversations of {templates} templates");
    assert!(templates > 0 && right == conversations);
}

/// `chat_cases.json`: small templates, with what transformers 5.23 makes of them.
#[test]
fn python_and_jinja_are_what_templates_take_them_for() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_cases.json");
    let file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let mut case = case.clone();
        for shared in ["messages", "tools", "kwargs"] {
            if case[shared].is_null() {
                case[shared] = file[shared].clone();
            }
        }
        let source = &case["template"];
        let got = rendered(&template(source, &file), &case);
        assert!(agrees(&case, &got, source.as_str().unwrap()), "{source}: {got:?}, not {case}");
    }
}
