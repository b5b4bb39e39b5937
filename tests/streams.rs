//! Where nothing can be written, and where nothing should be let in.

use std::process::Command;

use crate::program::{Run, artifact, demo_text, gptq, run, words, workplace};

/// The program by a shell, with what the shell does to its streams.
fn in_shell(script: &str, arguments: &[&str]) -> Run {
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh", env!("CARGO_BIN_EXE_gptq")]).args(arguments);
    run(shell
        .env_remove("RUST_LOG")
        .env_remove("GPTQ_DATASETS")
        .env("HF_HUB_CACHE", "/no-hub-cache")
        .env("HF_HUB_OFFLINE", "1"))
}

#[test]
fn a_log_that_cannot_be_written_costs_no_result() {
    let (model, text) = (artifact(""), demo_text("test"));
    let model = model.to_str().unwrap();
    let arguments =
        ["eval", model, "--dataset", &text, "--ctx", "64", "--max-windows", "2", "--device", "cpu", "-vv"];
    let expected = in_shell("\"$@\" 2>/dev/null", &arguments).ok();
    let without = in_shell("\"$@\" 2>/dev/full", &arguments);
    let figure = |text: &str| text.lines().find(|line| line.starts_with("perplexity")).unwrap().to_owned();
    assert_eq!(figure(&without.ok()), figure(&expected));
    assert_eq!(
        in_shell("\"$@\" 2>/dev/full", &["inspect", "/nowhere"]).code,
        Some(1),
        "an error, and no panic"
    );
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let left = in_shell("{ \"$@\"; echo $? >&3; } 3>&2 | head -1", &["table", "causallm-7b"]);
    assert_eq!(left.stderr.trim(), "0");
    let full = in_shell("\"$@\" >/dev/full", &["table", "causallm-7b"]).refusal();
    assert!(full.contains("No space left"), "{full}");
}

#[test]
fn an_empty_key_does_not_open_the_server() {
    let work = workplace("keys");
    let file = work.join("key");
    std::fs::write(&file, "\n").unwrap();
    let file = file.to_str().unwrap();
    let serve = || {
        let mut command = gptq("serve");
        command.arg("--model-id").arg(artifact("")).args(words("--port 0 --device cpu"));
        command
    };
    for options in [&["--api-key", ""][..], &["--api-key", "  "], &["--api-key-file", file]] {
        let refusal = run(serve().args(options)).refusal();
        assert!(refusal.contains("expected a key, got an empty one"), "{refusal}");
    }
    let unset = run(serve().env("API_KEY", "")).refusal();
    assert!(unset.contains("API_KEY"), "{unset}");
}
