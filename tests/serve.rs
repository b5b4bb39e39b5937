//! The server as its clients meet it: the real program on a free port with the demo model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::MutexGuard;
use std::time::Duration;

use serde_json::{Value, json};

use crate::program::{alone, demo, gptq, words};

struct Server {
    child: Child,
    address: String,
    _cores: MutexGuard<'static, ()>,
}

impl Server {
    /// Returns once the model is loaded.
    fn start(options: &str) -> Self {
        let cores = alone();
        let mut command = gptq("serve");
        command.args(["--model-id", demo().to_str().unwrap()]);
        command.args(words("--port 0 --device cpu --max-total-tokens 256")).args(words(options));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().to_owned();
        let server = Self { child, address, _cores: cores };
        while server.get("/health").status == 503 {
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    fn send(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head =
            format!("{head}\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(&format!("GET {path} HTTP/1.1"), b""))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.raw(path, body.to_string().as_bytes())
    }

    fn raw(&self, path: &str, body: &[u8]) -> Answer {
        Answer::read(self.send(&format!("POST {path} HTTP/1.1"), body))
    }

    fn generate(&self, inputs: &str, parameters: Value) -> Value {
        let answer = self.post("/generate", &json!({"inputs": inputs, "parameters": parameters}));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// SIGTERM, through the shell's own `kill`.
    fn terminate(&self) {
        let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", self.child.id())]).status();
        assert!(kill.unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let head = head.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.contains("transfer-encoding: chunked");
        let body = if chunked { dechunked(body) } else { body.to_owned() };
        Self { status, head, body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Contents of the events of a stream.
    fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    whole
}

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
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("gptq_kv_cache_blocks_used 0\n"), "blocks leaked: {metrics}");
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
fn the_key_guards_what_computes() {
    let server = Server::start("--api-key secret");
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 1}}).to_string();
    let with = |header: &str| {
        Answer::read(server.send(&format!("POST /generate HTTP/1.1{header}"), body.as_bytes())).status
    };
    assert_eq!(with(""), 401);
    assert_eq!(with("\r\nauthorization: Bearer wrong"), 401);
    assert_eq!(with("\r\nauthorization: Bearer secret"), 200);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn clients_that_leave_free_their_place_and_those_above_the_limit_are_told() {
    let server = Server::start("--max-concurrent-requests 1");
    let long = json!({"inputs": "a", "parameters": {"max_new_tokens": 250}}).to_string();
    let mut first = server.send("POST /generate_stream HTTP/1.1", long.as_bytes());
    first.read_exact(&mut [0; 15]).unwrap();
    let refused = server.raw("/generate", long.as_bytes());
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.head.contains("retry-after: 1"));
    drop(first);
    let short = json!({"inputs": "a", "parameters": {"max_new_tokens": 1}});
    while server.post("/generate", &short).status == 429 {
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn sigterm_lets_running_answers_end() {
    let mut server = Server::start("");
    let body = json!({"inputs": "The city of", "parameters": {"max_new_tokens": 200}}).to_string();
    let mut stream = server.send("POST /generate_stream HTTP/1.1", body.as_bytes());
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\""), "{rest}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}
