//! Fields of requests, and what counts where they say nothing.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Server;
use crate::program::{copy_folder, demo, gptq, run, words, workplace};

/// The demo's model with another file.
fn with_file(name: &str, file: &str, content: &str) -> PathBuf {
    let model = workplace(name);
    copy_folder(&demo(), &model);
    std::fs::write(model.join(file), content).unwrap();
    model
}

fn with(body: &Value, more: &Value) -> Value {
    let mut body = body.clone();
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn completion(server: &Server, more: &Value) -> Value {
    let body = with(&json!({"prompt": "The river", "max_tokens": 6, "temperature": 0}), more);
    let answer = server.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{body}: {}", answer.body);
    answer.json()
}

/// Its id in the demo's vocabulary.
const IM_END: &str = "2";

#[test]
fn a_special_token_can_be_a_stop_string() {
    let server = Server::start("");
    // The bias makes it the likeliest token.
    let forced = json!({"max_new_tokens": 6, "logit_bias": {IM_END: 100}, "details": true});
    let details = |more: Value| server.generate("a", with(&forced, &more));
    let free = details(json!({}));
    assert_eq!((&free["generated_text"], &free["details"]["finish_reason"]), (&json!(""), &json!("length")));
    let ended = details(json!({"stop": ["<|im_end|>"]}));
    assert_eq!(ended["generated_text"], "");
    let (reason, count) = (&ended["details"]["finish_reason"], &ended["details"]["generated_tokens"]);
    assert_eq!((reason, count), (&json!("stop_sequence"), &json!(1)));
    let twice = details(json!({"stop": "<|im_end|><|im_end|>", "include_stop_str_in_output": true}));
    assert_eq!(twice["generated_text"], "<|im_end|><|im_end|>");
    assert_eq!(twice["details"]["generated_tokens"], 2);

    let answer = completion(&server, &json!({"logit_bias": {IM_END: 100}, "stop": "<|im_end|>"}));
    assert_eq!(
        (&answer["choices"][0]["finish_reason"], &answer["choices"][0]["text"]),
        (&json!("stop"), &json!(""))
    );
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    let shown = completion(
        &server,
        &json!({"logit_bias": {IM_END: 100}, "max_tokens": 2, "skip_special_tokens": false}),
    );
    assert_eq!(shown["choices"][0]["text"], "<|im_end|><|im_end|>");
    let by_id = completion(&server, &json!({"logit_bias": {IM_END: 100}, "stop_token_ids": [2]}));
    assert_eq!(
        (&by_id["choices"][0]["finish_reason"], &by_id["usage"]["completion_tokens"]),
        (&json!("stop"), &json!(1))
    );
}

#[test]
fn an_end_waits_for_the_least_number_of_tokens_or_is_ignored() {
    let server = Server::start("");
    let tokens = |more: Value| {
        let answer = completion(&server, &with(&json!({"logit_bias": {"0": 100}}), &more));
        (
            answer["usage"]["completion_tokens"].as_u64().unwrap(),
            answer["choices"][0]["finish_reason"].clone(),
        )
    };
    assert_eq!(tokens(json!({})), (1, json!("stop")));
    assert_eq!(tokens(json!({"min_tokens": 3})), (4, json!("stop")));
    assert_eq!(tokens(json!({"ignore_eos": true})), (6, json!("length")));
    let parameters =
        json!({"max_new_tokens": 6, "logit_bias": {"0": 100}, "details": true, "min_new_tokens": 2});
    assert_eq!(server.generate("The river", parameters)["details"]["generated_tokens"], 3);
    let text = completion(&server, &json!({}))["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().take(2).collect();
    let late = completion(&server, &json!({"stop": stop, "min_tokens": 2}));
    assert!(late["usage"]["completion_tokens"].as_u64().unwrap() > 2, "{late}");
    assert_eq!(
        server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 2, "min_tokens": 3})).status,
        422
    );
}

#[test]
fn a_prompt_can_be_scored_alone_whole_or_as_a_stream() {
    let server = Server::start("");
    let wanted = json!({"max_tokens": 0, "echo": true, "logprobs": 1});
    let answer = completion(&server, &wanted);
    let one_more = completion(&server, &with(&wanted, &json!({"max_tokens": 1})));
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &answer["usage"]["completion_tokens"]), (&json!("The river"), &json!(0)));
    let (logprobs, longer) = (&choice["logprobs"], &one_more["choices"][0]["logprobs"]);
    let count = logprobs["tokens"].as_array().unwrap().len();
    assert_eq!(longer["tokens"].as_array().unwrap().len(), count + 1);
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let [alone, longer] = [logprobs, longer].map(|all| all[column].as_array().unwrap());
        assert_eq!(alone[..], longer[..count], "{column}");
    }
    let mut first = logprobs["token_logprobs"].as_array().unwrap().iter();
    assert!(first.next().unwrap().is_null() && first.all(|logprob| logprob.as_f64().unwrap() < 0.0));

    let body = with(&json!({"prompt": "The river", "stream": true}), &wanted);
    let stream = server.post("/v1/completions", &body);
    let events = stream.events();
    assert_eq!((events.len(), events[1]), (2, "[DONE]"));
    assert_eq!(serde_json::from_str::<Value>(events[0]).unwrap()["choices"][0]["logprobs"], *logprobs);
    let alone = server.post("/v1/completions", &json!({"prompt": "The river", "max_tokens": 0}));
    assert_eq!(alone.status, 422, "without an echo there would be nothing");
}

#[test]
fn what_is_not_done_is_refused_by_name_and_what_does_not_matter_is_not() {
    let server = Server::start("");
    let message = json!([{"role": "user", "content": "Hi"}]);
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 1})),
        ("/v1/chat/completions", json!({"messages": message, "max_tokens": 1})),
        ("/generate", json!({"inputs": "a", "parameters": {"max_new_tokens": 1}})),
    ] {
        let ask = |name: &str, value: &Value| {
            let mut body = body.clone();
            let at = if path == "/generate" { &mut body["parameters"] } else { &mut body };
            at[name] = value.clone();
            server.post(path, &body)
        };
        for (name, value) in [
            ("guided_json", json!({"type": "object"})),
            ("use_beam_search", json!(true)),
            ("no_such_thing", json!(1)),
            ("top_k", json!(-2)),
            ("min_p", json!(1.5)),
            ("stop_token_ids", json!([9_999_999])),
        ] {
            let answer = ask(name, &value);
            assert!(answer.status == 422 && answer.body.contains(name), "{path} {name}: {}", answer.body);
        }
        for (name, value) in [
            ("guided_json", json!(null)),
            ("use_beam_search", json!(false)),
            ("top_k", json!(-1)),
            ("top_k", json!(0)),
            ("top_p", json!(1)),
            ("min_p", json!(0.9)),
        ] {
            let answer = ask(name, &value);
            assert_eq!(answer.status, 200, "{path} {name}: {}", answer.body);
        }
    }
    completion(&server, &json!({"user": "u", "model": "m", "metadata": {"a": "b"}, "service_tier": "auto"}));
    let sharp = |seed: u64| completion(&server, &json!({"temperature": 1.5, "min_p": 1.0, "seed": seed}));
    let text = |answer: Value| answer["choices"][0]["text"].clone();
    assert_eq!(text(sharp(1)), text(completion(&server, &json!({}))), "the likeliest token alone is kept");
}

#[test]
fn a_template_gets_what_the_request_has_for_it() {
    let config = json!({"chat_template": "{{ tone }}:{{ messages[0].content }}:{{ messages[0].mood }}\
        {% if add_generation_prompt %}>{% endif %}{{ documents[0].title }}"});
    let model = with_file("template-kwargs", "tokenizer_config.json", &config.to_string());
    let server = Server::of(&model, "");
    let messages = json!([{"role": "user", "content": "x", "mood": "glad"}]);
    let text = |more: Value| {
        let answer = server.post("/chat_tokenize", &with(&json!({"messages": messages}), &more));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["templated_text"].clone()
    };
    let kwargs = json!({"chat_template_kwargs": {"tone": "warm"}, "documents": [{"title": "T"}]});
    assert_eq!(text(kwargs), "warm:x:glad>T");
    assert_eq!(text(json!({"add_generation_prompt": false, "documents": [{"title": "T"}]})), ":x:gladT");
}

fn generated(model: &Path, options: &str) -> Value {
    let mut command = gptq("generate");
    command.arg(model).args(["--prompt", "The river"]);
    command.args(words("--max-new-tokens 12 --device cpu --json")).args(words(options));
    run(&mut command).json()
}

#[test]
fn generation_config_ends_texts_and_gives_defaults_which_flags_and_fields_override() {
    let tokens = {
        let server = Server::start("");
        let details =
            server.generate("The river", json!({"max_new_tokens": 12, "details": true}))["details"].clone();
        let ids = details["tokens"].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap());
        ids.collect::<Vec<_>>()
    };
    let end = tokens[4];
    let before = tokens.iter().position(|id| *id == end).unwrap();
    let file = json!({"eos_token_id": [0, end]}).to_string();
    let model = with_file("generation-config", "generation_config.json", &file);
    let answer = generated(&model, "");
    assert_eq!(
        (&answer["finish_reason"], &answer["generated_tokens"]),
        (&json!("eos_token"), &json!(before + 1))
    );
    let answer = generated(&model, "--ignore-eos");
    assert_eq!(answer["generated_tokens"], 12);
    let server = Server::of(&model, "");
    let answer = completion(&server, &json!({"max_tokens": 12}));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], before + 1);
    drop(server);

    let file =
        json!({"do_sample": false, "temperature": 0.9, "max_new_tokens": 5, "num_beams": 4}).to_string();
    let model = with_file("greedy-config", "generation_config.json", &file);
    let server = Server::of(&model, "");
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let ask = |more: Value| server.post("/v1/chat/completions", &with(&body, &more)).json();
    let content = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    let (greedy, asked) = (ask(json!({})), ask(json!({"temperature": 0})));
    assert_eq!(content(&greedy), content(&asked));
    assert_eq!(greedy["usage"]["completion_tokens"], 5);
    assert_eq!(ask(json!({"max_tokens": 7, "ignore_eos": true}))["usage"]["completion_tokens"], 7);
}

#[test]
fn a_bad_generation_config_is_refused_by_name() {
    let model = with_file("bad-generation-config", "generation_config.json", r#"{"top_p": 7}"#);
    for verb in ["generate", "chat"] {
        let mut command = gptq(verb);
        command.arg(&model).args(words(if verb == "generate" { "--prompt a" } else { "" }));
        let refused = run(command.args(words("--device cpu")));
        assert_ne!(refused.code, Some(0));
        let error = refused.stderr;
        let expected = "generation_config.json: top_p: expected a number above 0, at most 1, got 7";
        assert!(error.contains(expected) && error.trim_end().lines().count() == 1, "{error}");
    }
}
