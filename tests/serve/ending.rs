//! How a server ends, whatever it is doing.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Server;
use crate::program::{artifact, gptq, words};

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let mut server = Server::start("");
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 250, "ignore_eos": true}}).to_string();
    let _answers: Vec<_> =
        (0..8).map(|_| server.send("POST /generate_stream HTTP/1.1", body.as_bytes())).collect();
    std::thread::sleep(Duration::from_millis(100));
    server.signal("INT");
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    server.signal("INT");
    let status = server.wait();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    // 0 where the answers were done before the second signal came.
    assert!(matches!(status.code(), Some(130 | 0)), "{status:?}");
}

#[test]
fn a_server_whose_log_is_full_answers_and_ends_as_it_should() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut server = Server::logging("", Stdio::from(full));
    for _ in 0..3 {
        server.generate("a", json!({"max_new_tokens": 1}));
    }
    assert_eq!(server.post("/generate", &json!({"inputs": 7})).status, 422);
    server.terminate();
    let status = server.wait();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}

/// The engine's end is the server's: no client goes on talking to a process that cannot answer.
#[test]
fn an_engine_that_cannot_begin_ends_the_server_with_its_reason() {
    let mut command = gptq("serve");
    command.arg("--model-id").arg(artifact("")).args(words("--port 0 --device cuda:99"));
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.lines().last().unwrap_or_default().starts_with("error: "), "{said}");
}

#[test]
fn a_server_told_to_stop_while_it_loads_does_not_load_on() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptq"));
    command.args(["serve", "--model-id"]).arg(artifact("")).args(words("--port 0 --device cpu"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(30));
    let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", child.id())]).status();
    assert!(kill.unwrap().success());
    let begun = Instant::now();
    child.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
