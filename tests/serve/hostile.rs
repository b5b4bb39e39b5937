//! Input that is wrong, huge, slow or from someone without the key.

use std::io::{Read, Write};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{Answer, Server};

#[test]
fn bad_input_gets_the_right_status_and_the_server_lives() {
    let server = Server::start("--payload-limit 10000");
    let generate = |parameters: &str| format!(r#"{{"inputs": "a", "parameters": {parameters}}}"#);
    let chat = |rest: &str| format!(r#"{{"messages": [{{"role": "user", "content": "a"}}], {rest}}}"#);
    let cases: [(&str, Vec<u8>, u16); 19] = [
        ("/generate", b"".into(), 422),
        ("/generate", b"{".into(), 422),
        ("/generate", b"\xff\xfe".into(), 422),
        ("/generate", b"{\"inputs\": 7}".into(), 422),
        ("/generate", b"{\"inputs\": \"\"}".into(), 422),
        ("/generate", vec![b' '; 20_000], 413),
        ("/generate", generate(r#"{"max_new_tokens": 0}"#).into(), 422),
        ("/generate", generate(r#"{"max_new_tokens": -1}"#).into(), 422),
        ("/generate", generate(r#"{"max_new_tokens": 99999999999999999999}"#).into(), 422),
        ("/generate", generate(r#"{"temperature": NaN}"#).into(), 422),
        ("/generate", generate(r#"{"temperature": 1e99}"#).into(), 422),
        ("/generate", generate(r#"{"top_p": 1.5}"#).into(), 422),
        ("/generate", generate(r#"{"best_of": 1000000}"#).into(), 422),
        ("/generate", generate(r#"{"stop": ["a", "b", "c", "d", "e"]}"#).into(), 422),
        ("/v1/chat/completions", b"{\"messages\": []}".into(), 422),
        ("/v1/chat/completions", chat(r#""n": 0"#).into(), 422),
        ("/v1/chat/completions", chat(r#""logit_bias": {"9999999": 1}"#).into(), 422),
        ("/nothing", b"{}".into(), 404),
        ("/info", b"{}".into(), 405),
    ];
    for (path, body, status) in cases {
        let answer = server.raw(path, &body);
        let text = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        assert_eq!(answer.status, status, "{path} {text}: {}", answer.body);
        let openai = path.starts_with("/v1");
        let message = if openai { &answer.json()["error"]["message"] } else { &answer.json()["error"] };
        assert!(message.is_string(), "{}", answer.body);
    }
    // What TGI refuses and clients send.
    server.generate("a", json!({"max_new_tokens": 1, "temperature": 0, "top_p": 1.0, "stop": "x"}));
}

#[test]
fn heads_and_bodies_that_do_not_arrive_end_their_connection() {
    let server = Server::start("--read-timeout 1");
    let part = |bytes: &[u8]| {
        let mut stream = server.connect();
        stream.write_all(bytes).unwrap();
        stream
    };
    let mut silent = part(b"");
    let mut head = part(b"POST /generate HTTP/1.1\r\nhost: localhost\r\nx-slow: ");
    let body = part(
        b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n\
        content-length: 50\r\n\r\n{",
    );
    let mut rest = Vec::new();
    for stream in [&mut silent, &mut head] {
        stream.read_to_end(&mut rest).unwrap();
    }
    assert!(!String::from_utf8_lossy(&rest).contains(" 200 "));
    let answer = Answer::read(body);
    assert_eq!((answer.status, &answer.json()["error_type"]), (408, &json!("timeout")));
    server.generate("a", json!({"max_new_tokens": 1}));
}

#[test]
fn a_head_that_trickles_in_is_given_up_too() {
    let server = Server::start("--read-timeout 1");
    let mut stream = server.connect();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    stream.write_all(b"GET /info HTTP/1.1\r\n").unwrap();
    // Ten times the limit: a server that starts its clock anew with every byte would still be listening.
    let gone = (0..100).any(|_| {
        let closed = matches!(stream.read(&mut [0; 256]), Ok(0));
        closed || stream.write_all(b"a").is_err()
    });
    assert!(gone, "the connection is still open");
}

/// Every body is a valid request with something changed, so most of it is understood.
#[test]
fn mutated_requests_get_an_answer_of_the_right_shape() {
    let server = Server::start("--payload-limit 100000");
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..400 {
        let (path, valid) = &requests()[round % 6];
        let body = mutated(&mut rng, valid);
        let answer = server.raw(path, &body);
        let text = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
        seen.insert(answer.status);
        assert!([200, 413, 422].contains(&answer.status), "{path} {}: {}", text(), answer.status);
        if answer.status != 200 {
            let message = match path.starts_with("/v1") {
                true => answer.json()["error"]["message"].clone(),
                false => answer.json()["error"].clone(),
            };
            assert!(message.is_string(), "{path} {}: {}", text(), answer.body);
        } else if answer.head.contains("text/event-stream") {
            assert!(!answer.events().is_empty(), "{path} {}", text());
        } else {
            answer.json();
        }
    }
    assert_eq!(seen.len(), 3, "the changes are too small or too large: {seen:?}");
    assert_eq!(server.raw("/generate", &vec![b' '; 10_000_000]).status, 413);
    server.generate("a", json!({"max_new_tokens": 1}));
    server.frees_all_blocks();
}

fn requests() -> [(&'static str, Value); 6] {
    let parameters = json!({"best_of": 1, "temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.1,
        "presence_penalty": 0.1, "top_k": 5, "top_p": 0.9, "typical_p": 0.9, "do_sample": true, "max_new_tokens": 3,
        "return_full_text": false, "stop": ["x"], "truncate": 8, "details": true,
        "decoder_input_details": false, "seed": 1, "top_n_tokens": 2,
        "logit_bias": {"5": 1.0}});
    let common = json!({"model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2, "stop": "x", "seed": 1,
        "max_tokens": 3, "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"5": 1}, "stream": false,
        "stream_options": {"include_usage": true}});
    let with = |more: Value| {
        let mut body = common.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let chat = with(json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
        "content": [{"type": "text", "text": "Ho"}]}], "logprobs": true, "top_logprobs": 2, "tools": []}));
    let completion = with(json!({"prompt": ["The river", "a"], "echo": true, "logprobs": 1}));
    [
        ("/generate", json!({"inputs": "The river", "parameters": parameters})),
        ("/generate_stream", json!({"inputs": "The river", "parameters": parameters})),
        ("/v1/chat/completions", chat.clone()),
        ("/v1/completions", completion),
        ("/chat_tokenize", chat),
        ("/tokenize", json!({"inputs": "The river"})),
    ]
}

/// One to three values replaced or removed; then, at times, the bytes are spoiled as well.
fn mutated(rng: &mut ChaCha8Rng, valid: &Value) -> Vec<u8> {
    let mut value = valid.clone();
    for _ in 0..rng.random_range(1..=3) {
        replace(rng, &mut value);
    }
    let mut bytes = value.to_string().into_bytes();
    match rng.random_range(0..12) {
        0 => bytes.truncate(rng.random_range(0..bytes.len())),
        1 => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        2 => {
            let at = rng.random_range(0..bytes.len());
            bytes.insert(at, 0xff);
        }
        3 => bytes.resize(150_000, b' '),
        _ => {}
    }
    bytes
}

/// Goes down to some value and puts another one in its place.
fn replace(rng: &mut ChaCha8Rng, value: &mut Value) {
    let deeper = match value {
        Value::Array(items) if !items.is_empty() => {
            let i = rng.random_range(0..items.len());
            items.get_mut(i)
        }
        Value::Object(map) if !map.is_empty() => {
            let i = rng.random_range(0..map.len());
            map.values_mut().nth(i)
        }
        _ => None,
    };
    match deeper {
        Some(inner) if rng.random_bool(0.9) => replace(rng, inner),
        _ => *value = strange(rng),
    }
}

fn strange(rng: &mut ChaCha8Rng) -> Value {
    let nested = |depth| (0..depth).fold(json!(1), |value, _| json!([value]));
    match rng.random_range(0..14) {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(0),
        3 => json!(u64::MAX),
        4 => json!(1e308),
        5 => json!(i64::MIN),
        6 => json!(0.5),
        7 => json!(""),
        8 => json!("\u{0}é\u{10ffff}"),
        9 => json!("a ".repeat(rng.random_range(1..2000))),
        10 => json!(vec!["a"; 100]),
        11 => json!({"a": {}, "type": "text"}),
        12 => nested(rng.random_range(1..200)),
        _ => json!(true),
    }
}
