//! Many clients at once, some of which disconnect, and a server that is told to stop.

use std::io::Read;
use std::time::Duration;

use serde_json::{Value, json};

use super::Server;
use crate::program::{demo, gptq, run, words};

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
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn under_load_no_stream_is_lost_and_sigterm_keeps_every_promise() {
    let mut server = Server::start("--max-concurrent-requests 16 --max-batch-total-tokens 1024");
    let bench = |options: &str| {
        let mut command = gptq("bench");
        command.args(["serve", "--json", "--url", &format!("http://{}", server.address)]);
        command.args(words("--tokens 48 --prompt-tokens 40")).args(words(options));
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let figures = |child: std::process::Child| -> Value {
        let output = child.wait_with_output().unwrap();
        let figures = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success(), "{figures}");
        figures
    };
    let at_the_limit = figures(bench("--clients 16 --requests 60 --seconds 60"));
    let count = |figures: &Value, name: &str| figures[name].as_u64().unwrap();
    assert_eq!(count(&at_the_limit, "whole"), 60, "{at_the_limit}");

    let above = bench("--clients 24 --seconds 60 --requests 2000 --abandon 0.2");
    let metric = |name: &str| -> u64 {
        let metrics = server.get("/metrics").body;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
        line.trim().parse().unwrap()
    };
    while metric("tgi_request_failure{err=\"overloaded\"}") == 0 || metric("tgi_request_success") < 90 {
        std::thread::sleep(Duration::from_millis(20));
    }
    server.terminate();
    let above = figures(above);
    assert!(count(&above, "abandoned") > 0 && count(&above, "refused") > 0, "{above}");
    assert_eq!((&above["broken"], &above["errors"]), (&json!(0), &json!({})), "{above}");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn the_engine_and_its_server_get_the_same_load_and_only_the_prefix_cache_saves_work() {
    let mut command = gptq("bench");
    command
        .arg("serve")
        .arg(demo())
        .args(words("--json --device cpu --clients 4 --requests 12 --seconds 600"));
    command.args(words("--prompt-tokens 64 --shared-prefix 48 --tokens 8 --temperature 0.8 --rounds 2"));
    let figures = run(&mut command).json();
    let rounds = figures["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2, "{figures}");
    for round in rounds {
        let count = |run: &str, name: &str| round[run][name].as_u64().unwrap();
        for name in ["whole", "tokens"] {
            assert_eq!(count("engine", name), count("http", name), "{name}: {figures}");
            assert_eq!(count("engine", name), count("http_without_prefix_cache", name), "{name}: {figures}");
        }
        assert_eq!(count("engine", "whole"), 12, "{figures}");
        // The first four may begin together, before anything is in the cache.
        assert!(count("engine", "cached_tokens") >= 8 * 32, "{figures}");
        assert!(count("http", "cached_tokens") >= 8 * 32, "{figures}");
        assert_eq!(count("http_without_prefix_cache", "cached_tokens"), 0, "{figures}");
    }
    assert!(figures["http_share"].as_f64().unwrap() > 0.0, "{figures}");
}
