//! A template's source as the engine gets it, so that whatever the engine does is within the limits.

use super::limits::{PIECE_BYTES, SOURCE_BYTES, TAG_TOKENS};
use super::operators::as_calls;
use super::source::tags;

/// Blanks in a row. They cannot be written in pieces, as tags beside them may take them away.
const BLANKS: usize = 4096;

/// Prints nothing. Text before it and behind it is written in steps of their own, with all its blanks.
const JOINT: &str = "{{''}}";
const RAW_JOINT: &str = "{% endraw %}{% raw %}";

/// Refuses a source that is too large to be parsed, in one line.
pub(super) fn check(source: &str) -> Result<(), String> {
    if source.len() > SOURCE_BYTES {
        return Err(format!("expected at most {SOURCE_BYTES} bytes of source, got {}", source.len()));
    }
    let longest = tags(source).iter().map(|tag| tag.tokens.len()).max().unwrap_or(0);
    if longest > TAG_TOKENS {
        return Err(format!("expected at most {TAG_TOKENS} tokens in a tag, got {longest}"));
    }
    let mut blanks = 0;
    for byte in source.bytes() {
        blanks = if byte.is_ascii_whitespace() { blanks + 1 } else { 0 };
        if blanks > BLANKS {
            return Err(format!("expected at most {BLANKS} blanks in a row"));
        }
    }
    Ok(())
}

/// The source with operators as calls, and long texts in pieces.
pub(super) fn bounded(source: &str) -> String {
    let mut out = String::with_capacity(source.len() * 2);
    let (mut at, mut raw) = (0, false);
    for tag in tags(source) {
        text(&source[at..tag.start], raw, &mut out);
        at = tag.end;
        raw = tag.statement && matches!(&tag.tokens[..], [name] if name.is_name("raw"));
        match (tag.tokens.first(), tag.tokens.last()) {
            (Some(first), Some(last)) if !raw => {
                out += &source[tag.start..first.at.start];
                out += &as_calls(source, &tag.tokens, tag.statement);
                out += &source[last.at.end..tag.end];
            }
            _ => out += &source[tag.start..tag.end],
        }
    }
    text(&source[at..], raw, &mut out);
    out
}

/// Text between two tags, comments included. A piece ends behind what is no blank: tags take blanks only.
fn text(text: &str, raw: bool, out: &mut String) {
    let (mut length, mut before, mut comment) = (0, ' ', false);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if !raw {
            comment = if comment { !out.ends_with("#}") } else { rest.starts_with("{#") };
        }
        let apart = !before.is_whitespace() && !matches!(before, '{' | '\\') && !matches!(c, '\n' | '\r');
        if length >= PIECE_BYTES && apart && !comment {
            *out += if raw { RAW_JOINT } else { JOINT };
            length = 0;
        }
        out.push(c);
        (before, length) = (c, length + c.len_utf8());
        rest = &rest[c.len_utf8()..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_become_calls_and_everything_else_stays() {
        for (source, expected) in [
            ("{{- a + b -}}", "{{- summed(a , b) -}}"),
            ("{{ a + b - c + 'd' + e }}", "{{ summed(summed(a , b) - c , 'd' , e) }}"),
            ("{{ a ~ b + c ~ -d * 2 }}", "{{ summed(joined(a , b) , joined(c , multiplied(-d , 2))) }}"),
            (
                "{{ a[b + 1:] ~ f(x=a + b, *c, **d) }}",
                "{{ joined(a.sliced(summed(b , 1), none, none) , f(x=summed(a , b), *c, **d)) }}",
            ),
            (
                "{{ a[::-1][:2].b[{1: 2}[c]] }}",
                "{{ a.sliced(none, none, -1).sliced(none, 2, none).b[{1: 2}[c]] }}",
            ),
            ("{{ a ** 2 // 3 % b }}", "{{ a ** 2 // 3 % b }}"),
            ("{{ a * b / c * d }}", "{{ multiplied(multiplied(a , b) / c , d) }}"),
            ("{{ 1e+5 + 1.5 }}", "{{ summed(1e+5 , 1.5) }}"),
            ("{% set x.y = a ~ b %}", "{% set x.y = joined(a , b) %}"),
            (
                "{% for x in a + b if x.c == d recursive %}",
                "{% for x in summed(a , b) if x.c|measured == d recursive %}",
            ),
            ("{% for a, b in c|items %}", "{% for a, b in c|items %}"),
            ("{% macro f(a, b=1 + 2) %}", "{% macro f(a, b=summed(1 , 2)) %}"),
            (
                "{% if a + b is not in c and not d == e %}",
                "{% if summed(a , b is not in c) and not d|measured == e %}",
            ),
            ("{% if a == 'b' and 'c' not in d.e[0] %}", "{% if a == 'b' and 'c' not in d.e[0]|measured %}"),
            (
                "{% elif (a if b else c) + d >= e.f(g + h) %}",
                "{% elif summed((a if b else c) , d)|measured >= e.f(summed(g , h)) %}",
            ),
            ("{{ {'a': b + c, d: [e ~ f]} }}", "{{ {'a': summed(b , c), d: [joined(e , f)]} }}"),
            ("{{ a | join(b + c) + d | trim }}", "{{ summed(a | join(summed(b , c)) , d | trim) }}"),
            ("{{ a.if + b.is }}", "{{ summed(a.if , b.is) }}"),
            ("{% raw %}{{ a + b }}{% endraw %}{# a + b #}", "{% raw %}{{ a + b }}{% endraw %}{# a + b #}"),
        ] {
            assert_eq!(bounded(source), expected);
        }
    }

    #[test]
    fn long_texts_are_in_pieces_that_end_behind_no_blank() {
        let word = "x".repeat(PIECE_BYTES);
        for (source, expected) in [
            (
                format!("{word}{word} y\n  {{{{ a }}}}"),
                format!("{word}{JOINT}{word}{JOINT} y\n  {{{{ a }}}}"),
            ),
            (format!("{word} \n {{% if a %}}"), format!("{word}{JOINT} \n {{% if a %}}")),
            (format!("{word}\n b"), format!("{word}\n b")),
            (format!("{{# {word}{word} #}}c"), format!("{{# {word}{word} #}}{JOINT}c")),
            (
                format!("{{% raw %}}{word}{{{{{{% endraw %}}"),
                format!("{{% raw %}}{word}{RAW_JOINT}{{{{{{% endraw %}}"),
            ),
        ] {
            assert_eq!(bounded(&source), expected);
        }
    }

    #[test]
    fn what_is_too_large_to_parse_is_refused_by_the_limit() {
        let refusal = |source: String| check(&source).unwrap_err();
        assert!(refusal("a".repeat(SOURCE_BYTES + 1)).contains("bytes of source"));
        assert!(refusal(format!("{{{{ 1{} }}}}", "+1".repeat(100_000))).contains("tokens in a tag"));
        assert!(refusal(" ".repeat(10_000)).contains("blanks"));
    }
}
