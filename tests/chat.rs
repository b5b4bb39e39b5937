//! `gptq chat` over a pipe, with the demo model.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::program::{alone, copy_folder, demo, gptq, words, workplace};

/// What the program answers to these lines.
pub fn talk(lines: impl AsRef<[u8]>) -> (String, String) {
    talk_with(&demo(), "", lines.as_ref())
}

fn talk_with(model: &Path, options: &str, lines: &[u8]) -> (String, String) {
    let _cores = alone();
    let mut command = gptq("chat");
    command.arg(model).args(words("--device cpu --temperature 0 --max-new-tokens 12")).args(words(options));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines).unwrap();
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
    let long = format!("/sing\n{}\n\n", "word ".repeat(20_000));
    let (out, err) = talk([long.as_bytes(), b"not \xff text\nThe river\n"].concat());
    assert_eq!(out, first);
    for said in ["unknown command /sing", "the message is too long", "not UTF-8"] {
        assert!(err.contains(said), "{said}: {err}");
    }
}

#[test]
fn a_refusal_of_the_template_ends_the_turn_and_not_the_program() {
    let model = changed("chat-template", "tokenizer_config.json", |config| {
        config["chat_template"] = "{% for m in messages %}{% if m.role == 'system' %}\
            {{ raise_exception('no instructions') }}{% endif %}{{ m.content }}{% endfor %}"
            .into();
    });
    let (first, _) = talk_with(&model, "", b"The river\n");
    let (out, err) = talk_with(&model, "", b"/system Be brief\nThe king\n/system\nThe river\n");
    assert_eq!(out, first);
    assert!(err.contains("no instructions"), "{err}");
}

#[test]
fn the_oldest_turns_are_forgotten_where_the_context_is_full() {
    let model =
        changed("chat-context", "config.json", |config| config["max_position_embeddings"] = 64.into());
    let (_, err) = talk_with(&model, "", "Tell me about the river and the old city.\n".repeat(4).as_bytes());
    assert!(err.contains("the context of 64 tokens is full: oldest turns forgotten: 1"), "{err}");
}

#[test]
fn a_turn_computes_what_is_new_and_not_the_conversation() {
    let (_, log) =
        talk_with(&demo(), "-v", b"Tell me about the river.\nAnd the king?\n/reset\nAnd the king?\n");
    let figure = |line: &str, name: &str| -> usize {
        let value = line.split_once(&format!("{name}=")).unwrap().1;
        value.split_whitespace().next().unwrap().parse().unwrap()
    };
    let turns: Vec<_> = log
        .lines()
        .filter(|line| line.contains("the conversation so far"))
        .map(|line| (figure(line, "tokens"), figure(line, "computed")))
        .collect();
    let [first, second, anew] = turns[..] else { panic!("{log}") };
    assert_eq!(first.0, first.1, "{log}");
    assert!(second.0 > first.0 + 12, "the second turn holds the first one and its answer: {log}");
    // The answer is encoded from its text, so that its end may be other tokens than those that were made.
    assert!(second.1 < second.0 - first.0 && second.1 > 1, "{log}");
    assert!(anew.0 < first.0 + 4 && anew.1 > 1, "{log}");
}

/// The demo model with another JSON file.
fn changed(name: &str, file: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
    let model = workplace(name);
    copy_folder(&demo(), &model);
    let path = model.join(file);
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    model
}
