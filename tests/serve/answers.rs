//! What clients get for what they ask.

use std::fs::File;

use serde_json::{Value, json};

use super::{Answer, Server};
use crate::chat::talk;
use crate::program::workplace;

#[test]
fn a_batch_of_32_gives_the_tokens_of_each_alone() {
    let server = Server::start("--max-batch-prefill-tokens 24 --max-batch-total-tokens 1024");
    let prompts: Vec<_> =
        (0..32).map(|i| "The river runs through the old city. ".repeat(1 + i % 5)).collect();
    let ids = |i: usize| {
        let parameters = json!({"max_new_tokens": 8 + i, "details": true});
        let answer = server.generate(&format!("{i} {}", prompts[i]), parameters);
        let tokens = answer["details"]["tokens"].as_array().unwrap().clone();
        tokens.into_iter().map(|token| token["id"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    let alone: Vec<_> = (0..32).map(ids).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let ids = &ids;
        let threads: Vec<_> = (0..32).map(|i| scope.spawn(move || ids(i))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
    server.frees_all_blocks();
}

#[test]
fn with_an_int8_cache_a_prompt_that_is_found_has_the_answer_of_one_that_is_computed() {
    let server = Server::start("--kv-cache-dtype int8");
    let ask = || server.generate(&"The old city. ".repeat(12), json!({"max_new_tokens": 24}));
    let computed = ask();
    assert_eq!(ask(), computed);
}

#[test]
fn a_stream_holds_the_same_text_as_the_whole_answer() {
    let server = Server::start("");
    let body = json!({"inputs": "The city of", "parameters": {"max_new_tokens": 20, "details": true}});
    let whole = server.post("/generate", &body).json();
    let stream = server.post("/generate_stream", &body);
    assert!(stream.head.contains("text/event-stream") && stream.head.contains("x-accel-buffering: no"));
    let events: Vec<Value> = stream.events().iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let text: String = events.iter().map(|event| event["token"]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["generated_text"]);
    let last = events.last().unwrap();
    assert_eq!((&last["generated_text"], &last["details"]["generated_tokens"]), (&json!(text), &json!(20)));
    assert_eq!(whole["details"]["finish_reason"], "length");
    assert_eq!(server.post("/", &body).json()[0]["generated_text"], text);

    let stop: String = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let parameters = json!({"max_new_tokens": 20, "details": true, "stop": stop});
    let stopped = server.generate("The city of", parameters);
    assert_eq!(stopped["generated_text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["details"]["finish_reason"], "stop_sequence");
}

#[test]
fn openai_clients_get_their_shapes() {
    let server = Server::start("");
    let ask = |more: Value| {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5,
            "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body)
    };
    let answer = ask(json!({"n": 2, "logprobs": true, "top_logprobs": 2})).json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(answer["choices"][0]["message"], answer["choices"][1]["message"]);
    let logprobs = &answer["choices"][0]["logprobs"]["content"][0];
    assert_eq!(logprobs["logprob"], logprobs["top_logprobs"][0]["logprob"], "greedy takes the likeliest");
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 5);

    let stream = ask(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut events = stream.events();
    assert_eq!(events.pop(), Some("[DONE]"));
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(events.last().unwrap()["usage"], answer_usage(&ask(json!({})).json()));
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, answer["choices"][0]["message"]["content"]);

    let text =
        server.post("/v1/completions", &json!({"prompt": "The", "max_tokens": 3, "logprobs": 1})).json();
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 3);
}

fn answer_usage(answer: &Value) -> Value {
    answer["usage"].clone()
}

#[test]
fn a_conversation_in_the_terminal_is_answered_as_one_that_is_sent_whole_every_time() {
    let said = ["Tell me about the river.", "And the king?", "Why?"];
    let (answers, _) = talk(said.join("\n"));
    let server = Server::start("");
    let (mut messages, mut expected) = (Vec::new(), String::new());
    for message in said {
        messages.push(json!({"role": "user", "content": message}));
        let body = json!({"messages": messages, "max_tokens": 12, "temperature": 0});
        let answer = server.post("/v1/chat/completions", &body).json();
        let content = &answer["choices"][0]["message"]["content"];
        messages.push(json!({"role": "assistant", "content": content}));
        expected += &format!("{}\n", content.as_str().unwrap());
    }
    assert_eq!(answers, expected);
}

#[test]
fn several_prompts_get_an_answer_each_and_tokens_serve_as_a_prompt() {
    let server = Server::start("--max-client-batch-size 3");
    let ask = |more: Value| {
        let mut body = json!({"model": "m", "max_tokens": 6, "temperature": 0, "logprobs": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    let texts = |answer: &Answer| -> Vec<String> {
        let choices = answer.json()["choices"].as_array().unwrap().clone();
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let alone: Vec<_> =
        ["The river", "A king"].iter().flat_map(|p| texts(&ask(json!({"prompt": p})))).collect();
    let [river, king] = &alone[..] else { panic!("{alone:?}") };
    let both = ask(json!({"prompt": ["The river", "A king"], "n": 2}));
    assert_eq!(texts(&both), [river, river, king, king].map(Clone::clone));
    assert_eq!(both.json()["usage"]["completion_tokens"], 24);

    let tokens = server.post("/tokenize", &json!({"inputs": "The river"})).json();
    let ids: Vec<_> = tokens.as_array().unwrap().iter().map(|token| token["id"].clone()).collect();
    assert_eq!(texts(&ask(json!({"prompt": ids}))), std::slice::from_ref(river));
    let echoed = ask(json!({"prompt": [ids, ids], "echo": true}));
    assert_eq!(texts(&echoed), [format!("The river{river}"), format!("The river{river}")]);
    assert_offsets(&echoed.json()["choices"][1], ids.len(), "The river".len());

    let stream = ask(json!({"prompt": ["The river", "A king"], "echo": true, "stream": true}));
    let mut pieces = [String::new(), String::new()];
    for event in stream.events().iter().filter(|event| **event != "[DONE]") {
        let choice = &serde_json::from_str::<Value>(event).unwrap()["choices"][0];
        let whole = &mut pieces[choice["index"].as_u64().unwrap() as usize];
        let before = whole.chars().count();
        let echo = if before == 0 { whole_echo(choice) } else { 0 };
        let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
        assert_eq!(offsets.last(), Some(&json!(before + echo)));
        assert_eq!(offsets.len() > 1, before == 0, "the prompt comes with the first piece alone");
        whole.push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(pieces, [format!("The river{river}"), format!("A king{king}")]);

    for bad in
        [json!([]), json!(["a", "b", "c", "d"]), json!([99_999_999]), json!([["a"]]), json!([[]]), json!(7)]
    {
        assert_eq!(ask(json!({"prompt": bad})).status, 422, "{bad}");
    }
}

/// Where the text of each token begins, of the prompt's and of six new ones.
fn assert_offsets(choice: &Value, prompt: usize, echo: usize) {
    let (text, offsets) =
        (choice["text"].as_str().unwrap(), choice["logprobs"]["text_offset"].as_array().unwrap());
    let offsets: Vec<_> = offsets.iter().map(|offset| offset.as_u64().unwrap() as usize).collect();
    assert_eq!((offsets.len(), offsets[0], offsets[prompt]), (prompt + 6, 0, echo));
    assert!(offsets.is_sorted() && offsets[prompt + 5] < text.chars().count(), "{offsets:?} in {text:?}");
}

#[test]
fn a_prompt_has_the_probabilities_that_its_tokens_had_when_they_were_made() {
    let server = Server::start("");
    let parameters = json!({"max_new_tokens": 40, "details": true, "decoder_input_details": true});
    let made = server.generate("The river", parameters)["details"].clone();
    let column = |tokens: &Value, name: &str| -> Vec<Value> {
        tokens.as_array().unwrap().iter().map(|token| token[name].clone()).collect()
    };
    let prefill = &made["prefill"];
    assert_eq!(prefill[0]["logprob"], Value::Null);
    let text: String = column(prefill, "text").iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(text, "The river");

    let ids = [column(prefill, "id"), column(&made["tokens"], "id")].concat();
    let body = json!({"prompt": ids, "echo": true, "logprobs": 2, "max_tokens": 1, "temperature": 0});
    let logprobs = server.post("/v1/completions", &body).json()["choices"][0]["logprobs"].clone();
    let again = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(again.len(), ids.len() + 1);
    assert_eq!((&again[0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    let before = [column(prefill, "logprob"), column(&made["tokens"], "logprob")].concat();
    for (place, (before, again)) in before.iter().zip(again).enumerate().skip(1) {
        let difference = (before.as_f64().unwrap() - again.as_f64().unwrap()).abs();
        // Rounding, of sums over a vocabulary in f32.
        assert!(difference < 1e-4, "place {place}: {before} when made, {again} in a prompt");
        assert_eq!(logprobs["top_logprobs"][place].as_object().unwrap().len(), 2);
    }

    let wanted = json!({"inputs": "a", "parameters": {"details": true, "decoder_input_details": true}});
    assert_eq!(server.post("/generate_stream", &wanted).status, 422);
    let unwanted = json!({"max_new_tokens": 1, "details": true});
    assert_eq!(server.generate("The river", unwanted)["details"]["prefill"], json!([]));
}

fn whole_echo(choice: &Value) -> usize {
    if choice["index"] == 0 { "The river".len() } else { "A king".len() }
}

#[test]
fn what_cannot_be_honoured_is_refused_and_the_best_of_several_is_kept() {
    let server = Server::start("");
    let chat = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body)
    };
    for (more, status) in [
        (json!({"response_format": {"type": "json_object"}}), 422),
        (json!({"response_format": {"type": "text"}, "tool_choice": "auto"}), 200),
        (json!({"tool_choice": "required"}), 422),
        (json!({"best_of": 2, "stream": true}), 422),
        (json!({"n": 2, "best_of": 1}), 422),
        (json!({"typical_p": 0.9, "best_of": 2}), 200),
    ] {
        assert_eq!(chat(more.clone()).status, status, "{more}");
    }
    let sum = |choice: &Value| -> f64 {
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        tokens.iter().map(|token| token["logprob"].as_f64().unwrap()).sum()
    };
    let both = chat(json!({"n": 2, "logprobs": true})).json();
    let best = chat(json!({"best_of": 2, "logprobs": true})).json();
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    let (one, other) = (sum(&both["choices"][0]), sum(&both["choices"][1]));
    assert!((one - other).abs() > 0.01, "either of the two could be the best: {one}, {other}");
    // Which requests share a step depends on when they come, and the last places of their scores on that.
    assert!((sum(&best["choices"][0]) - one.max(other)).abs() < 1e-4);

    let plain = json!({"max_new_tokens": 1, "details": true});
    let id = server.generate("The river", plain.clone())["details"]["tokens"][0]["id"].clone();
    let mut forbidden = plain;
    forbidden["logit_bias"] = json!({id.to_string(): -100});
    assert_ne!(server.generate("The river", forbidden)["details"]["tokens"][0]["id"], id);
}

#[test]
fn a_request_leaves_one_line_and_its_times() {
    let log = workplace("access-log").join("log");
    let mut server = Server::logging("--json-output", File::create(&log).unwrap().into());
    let body = json!({"inputs": "The city of", "parameters": {"max_new_tokens": 7}}).to_string();
    let answer =
        Answer::read(server.send("POST /generate_stream HTTP/1.1\r\nx-request-id: mine-1", body.as_bytes()));
    assert!(answer.head.contains("x-request-id: mine-1"), "{}", answer.head);
    assert!(server.get("/info").head.contains("x-request-id: "));

    let metrics = server.get("/metrics").body;
    for histogram in ["duration", "queue_duration", "inference_duration", "mean_time_per_token_duration"] {
        let name = format!("tgi_request_{histogram}");
        assert!(metrics.contains(&format!("# TYPE {name} histogram\n")), "{metrics}");
        assert!(metrics.contains(&format!("{name}_bucket{{le=\"+Inf\"}} 1\n{name}_sum ")), "{metrics}");
        assert!(metrics.contains(&format!("{name}_count 1\n")), "{metrics}");
    }
    assert!(metrics.contains("tgi_request_generated_tokens_sum 7\n"), "{metrics}");
    assert!(metrics.contains("tgi_request_success 1\n"), "{metrics}");

    server.terminate();
    assert!(server.wait().success());
    let log = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mine: Vec<_> = lines.iter().filter(|line| line["fields"]["request"] == "mine-1").collect();
    let [line] = &mine[..] else { panic!("{log}") };
    let fields = &line["fields"];
    assert_eq!(
        (&fields["method"], &fields["path"], &fields["status"], &fields["tokens"]),
        (&json!("POST"), &json!("/generate_stream"), &json!(200), &json!(7))
    );
    assert!(fields["seconds"].as_f64().unwrap() > 0.0);
}
