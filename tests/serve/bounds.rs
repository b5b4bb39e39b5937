//! What requests may cost, refused ones too.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Answer, Server};

/// The most memory that the process had so far, in MB.
fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[test]
fn prompts_that_are_refused_cost_little_memory_and_hold_nobody_up() {
    let server = Server::start("");
    server.generate("a", json!({"max_new_tokens": 1}));
    let before = peak(&server);
    let huge = "river ".repeat(320_000);
    let bodies = [
        ("/generate", json!({"inputs": huge})),
        ("/generate", json!({"inputs": huge, "parameters": {"truncate": 1, "max_new_tokens": 1}})),
        ("/v1/completions", json!({"prompt": huge})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": huge}]})),
        ("/tokenize", json!({"inputs": huge})),
        ("/tokenize", json!({"inputs": "a".repeat(1_900_000)})),
    ];
    std::thread::scope(|scope| {
        let ask = |(path, body): &(&str, serde_json::Value)| {
            let text = body.to_string();
            let answer = Answer::read(server.send(&format!("POST {path} HTTP/1.1"), text.as_bytes()));
            let truncated = body["parameters"]["truncate"] == 1;
            assert_eq!(
                answer.status,
                if truncated { 200 } else { 422 },
                "{path}: {}",
                &answer.body[..200.min(answer.body.len())]
            );
        };
        for body in bodies.iter().chain(&bodies) {
            scope.spawn(move || ask(body));
        }
        std::thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        assert_eq!(server.get("/health").status, 200);
        server.generate("a", json!({"max_new_tokens": 1}));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    });
    let grown = peak(&server) - before;
    assert!(grown < 400, "{grown} MB for prompts that were refused");
}

#[test]
fn places_in_a_long_text_are_found_in_one_pass() {
    let server = Server::start("");
    let time = |letters: usize| {
        let text = "ä".repeat(letters);
        let begun = Instant::now();
        let spans = server.post("/tokenize", &json!({"inputs": text, "add_special_tokens": false})).json();
        let spans = spans.as_array().unwrap();
        let whole: String = spans.iter().map(|span| span["text"].as_str().unwrap()).collect();
        assert!(whole.starts_with(&text[..text.len() / 2]), "every character is in some token");
        begun.elapsed().as_secs_f64()
    };
    time(100);
    // The least of some: other processes take time too.
    let least = |letters| (0..4).map(|_| time(letters)).fold(f64::INFINITY, f64::min);
    let (short, long) = (least(2_000), least(30_000));
    assert!(long < 60.0 * short.max(0.005), "{short} s for 2,000 letters and {long} s for 30,000");
}
