//! `gptq chat` over a pipe, with the demo model.

use std::io::Write;
use std::process::Stdio;

use crate::program::{alone, demo, gptq, words};

/// What the program answers to these lines.
fn talk(lines: &str) -> (String, String) {
    let _cores = alone();
    let mut command = gptq("chat");
    command.arg(demo()).args(words("--device cpu --temperature 0 --max-new-tokens 12"));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert!(done.status.success(), "{err}");
    (out, err)
}

#[test]
fn an_answer_depends_on_what_was_said_before_until_reset() {
    let (first, _) = talk("The river\n");
    assert!(first.trim().len() > 3, "{first:?}");
    let (both, _) = talk("The river\nThe river\n");
    let second = both.strip_prefix(&first).expect("the first answer comes first");
    assert_ne!(second, first, "the conversation counts");
    let (reset, _) = talk("The river\nThe river\n/reset\nThe river\n");
    assert_eq!(reset, format!("{both}{first}"));
    let (instructed, _) =
        talk("/system The king of England\nThe river\n/system\nThe river\n/quit\nno more\n");
    assert_ne!(instructed.strip_suffix(&first).expect("no system message again"), first);
}

#[test]
fn what_cannot_be_answered_is_said_and_the_conversation_goes_on() {
    let (first, _) = talk("The river\n");
    let (out, err) = talk(&format!("/sing\n{}\n\nThe river\n", "word ".repeat(20_000)));
    assert_eq!(out, first);
    assert!(err.contains("unknown command /sing") && err.contains("the message is too long"), "{err}");
}
