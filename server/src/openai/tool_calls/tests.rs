//! Each form, whole and cut at every place.

use super::ToolFormat::{Hermes, Llama, Mistral};
use super::*;

fn text(text: &str) -> Piece {
    Piece::Text(text.into())
}

fn call(name: &str, arguments: &str) -> Piece {
    Piece::Call { name: name.into(), arguments: arguments.into() }
}

fn parsed<'a>(format: ToolFormat, answer: impl IntoIterator<Item = &'a str>) -> Vec<Piece> {
    let mut parser = ToolCallParser::new(format);
    let mut pieces: Vec<Piece> = answer.into_iter().flat_map(|piece| parser.push(piece)).collect();
    pieces.extend(parser.finish());
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(before)), Piece::Text(text)) => *before += &text,
            (_, piece) => joined.push(piece),
        }
    }
    joined
}

fn cases() -> Vec<(ToolFormat, &'static str, Vec<Piece>)> {
    let as_it_is = |format, answer: &'static str| (format, answer, vec![text(answer)]);
    vec![
        (
            Hermes,
            "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"</tool_call>é\"}}\n</tool_call>\n\
             <tool_call>{\"name\": \"g\"}</tool_call> ",
            vec![text("Let me see.\n"), call("f", "{\"x\":\"</tool_call>é\"}"), call("g", "{}")],
        ),
        (Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {}}\n", vec![call("f", "{}")]),
        (
            Hermes,
            "\n<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call> done",
            vec![call("f", "{\"a\": 1}"), text(" done")],
        ),
        (
            Hermes,
            "<tool_call>{bad}</tool_call><tool_call>{\"name\": \"f\"}</tool_call>",
            vec![text("<tool_call>{bad}</tool_call>"), call("f", "{}")],
        ),
        as_it_is(Hermes, "a <tool <b> 1 < 2 <tool_call>{\"name\": \"f\", \"argu"),
        as_it_is(Hermes, "<tool_call>{\"name\": 1}</tool_call> and <tool_"),
        as_it_is(Hermes, " \n"),
        as_it_is(Hermes, "  plain {\"name\": \"f\", \"parameters\": {}}"),
        (Llama, "{\"name\": \"f\", \"parameters\": {\"x\": [1, 2.5]}}", vec![call("f", "{\"x\":[1,2.5]}")]),
        (
            Llama,
            "\n<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"arguments\": {}}\n",
            vec![call("f", "{}"), call("g", "{}")],
        ),
        (
            Llama,
            "{\"name\": \"f\", \"parameters\": {}};no {\"name\": 1}",
            vec![call("f", "{}"), text(";no {\"name\": 1}")],
        ),
        as_it_is(Llama, "{\"name\": \"Anna\", \"age\": 3} is JSON"),
        as_it_is(Llama, "Then {\"name\": \"f\", \"parameters\": {}}"),
        as_it_is(Llama, "<|python_tag|>print(1); x < |"),
        (
            Mistral,
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": \"]\"}}, {\"name\": \"g\", \"arguments\": {}}]",
            vec![call("f", "{\"a\":\"]\"}"), call("g", "{}")],
        ),
        (
            Mistral,
            "Sure.[TOOL_CALLS]get_it{\"a\": {\"b\": 1}}[TOOL_CALLS]h-2[CALL_ID]abc123[ARGS]{}[TOOL_CALLS]i[ARGS]{}",
            vec![text("Sure."), call("get_it", "{\"a\":{\"b\":1}}"), call("h-2", "{}"), call("i", "{}")],
        ),
        as_it_is(Mistral, "[TOOL_CALLS][] [TOOL_CALLS]name and more [TOOL"),
        as_it_is(Mistral, "[TOOL_CALLS]f[ARGS]{\"a\": "),
    ]
}

#[test]
fn calls_are_found_and_all_else_is_text() {
    for (format, answer, expected) in cases() {
        assert_eq!(parsed(format, [answer]), expected, "{answer}");
    }
}

#[test]
fn pieces_do_not_depend_on_where_the_answer_is_cut() {
    for (format, answer, expected) in cases() {
        for at in (0..=answer.len()).filter(|at| answer.is_char_boundary(*at)) {
            let (before, after) = answer.split_at(at);
            assert_eq!(parsed(format, [before, after]), expected, "{before} | {after}");
        }
        let characters = answer.char_indices().map(|(at, c)| &answer[at..at + c.len_utf8()]);
        assert_eq!(parsed(format, characters), expected, "{answer}");
    }
}

#[test]
fn text_that_cannot_be_a_call_does_not_wait() {
    let mut parser = ToolCallParser::new(Hermes);
    assert_eq!(parser.push("Hello <to"), [text("Hello ")]);
    assert_eq!(parser.push("ns> of"), [text("<tons> of")]);
}

#[test]
fn the_template_tells_the_format() {
    for (source, format) in [
        ("{{ '<tool_call>\\n' }}", Some(Hermes)),
        ("<tool_call>\n<function=example>", None),
        ("{{ '[TOOL_CALLS]' }}", Some(Mistral)),
        ("<|start_header_id|> {\"name\": x, \"parameters\": y}", Some(Llama)),
        ("{{ '<|python_tag|>' }}", Some(Llama)),
        ("{{ '<|start_header_id|>' }}", None),
    ] {
        assert_eq!(ToolFormat::of_template(source), format, "{source}");
    }
}
