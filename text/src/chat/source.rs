//! What a template's text shows: its tags, and how it takes the content of a message.

use std::collections::HashSet;
use std::ops::Range;

/// A statement or an expression between its delimiters.
pub(super) struct Tag<'a> {
    /// `{% %}`, and not `{{ }}`.
    pub statement: bool,
    pub tokens: Vec<Token<'a>>,
    /// Where its delimiter is.
    pub start: usize,
    /// Where the text behind it begins.
    pub end: usize,
}

#[derive(Clone)]
pub(super) struct Token<'a> {
    pub kind: Kind,
    /// What is written, without the quotes of a text.
    pub text: &'a str,
    pub at: Range<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Text,
    Other,
}

impl Token<'_> {
    pub fn is_name(&self, name: &str) -> bool {
        self.kind == Kind::Name && self.text == name
    }

    fn is(&self, symbol: &str) -> bool {
        self.kind == Kind::Other && self.text == symbol
    }
}

/// The template as the engine has to have it, to render what Python's Jinja does:
///
/// - `generation` tags mark answers for training and print nothing. Each becomes a block of the engine's own, with
///   the same rules for blanks and for variables.
/// - A loop over nothing fails, where the engine would go on: `for x in y` becomes `for x in (y)|iterated`.
/// - Every line end is a line feed, and one behind `{% raw %}` stays.
pub(super) fn for_engine(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    let mut replace = |at: Range<usize>, by: &str| {
        out += &source[copied..at.start];
        out += by;
        copied = at.end;
    };
    for Tag { tokens, end, .. } in tags(&source).into_iter().filter(|tag| tag.statement) {
        match &tokens[..] {
            [tag] if tag.is_name("generation") => replace(tag.at.clone(), "with"),
            [tag] if tag.is_name("endgeneration") => replace(tag.at.clone(), "endwith"),
            [tag] if tag.is_name("raw") && source[end..].starts_with('\n') => replace(end..end, "\n"),
            [tag, rest @ ..] if tag.is_name("for") => {
                let over = iterated(rest).unwrap_or_default();
                if let (Some(first), Some(last)) = (over.first(), over.last()) {
                    replace(first.at.start..first.at.start, "(");
                    replace(last.at.end..last.at.end, ")|iterated");
                }
            }
            _ => {}
        }
    }
    out + &source[copied..]
}

/// What a loop goes through: the tokens from `in` up to a condition.
fn iterated<'a, 'b>(tokens: &'a [Token<'b>]) -> Option<&'a [Token<'b>]> {
    let start = tokens.iter().position(|token| token.is_name("in"))? + 1;
    let mut open = 0;
    let ends = |token: &Token| {
        open += match token.text {
            "(" | "[" | "{" if token.kind == Kind::Other => 1,
            ")" | "]" | "}" if token.kind == Kind::Other => -1,
            _ => 0,
        };
        open == 0 && (token.is_name("if") || token.is_name("recursive"))
    };
    let end = tokens[start..].iter().position(ends).map_or(tokens.len(), |at| start + at);
    Some(&tokens[start..end])
}

/// Whether the template goes through the parts of a message's content itself: a loop, or `selectattr`, `rejectattr`
/// or `map`, over `….content`, `…['content']`, a variable `content`, or one that was set to such a value. A test
/// such as `content is string` says nothing of what happens where it does not hold.
pub(super) fn iterates_over_content(source: &str) -> bool {
    let tags = tags(source);
    let mut names = HashSet::from(["content"]);
    for Tag { tokens, .. } in tags.iter().filter(|tag| tag.statement) {
        if let [set, name, equals, value @ ..] = &tokens[..]
            && set.is_name("set")
            && equals.is("=")
            && content_at(value, &names).any(|rest| rest.is_empty())
        {
            names.insert(name.text);
        }
    }
    tags.iter().any(|Tag { tokens, .. }| {
        let loops = tokens.first().is_some_and(|first| first.is_name("for"));
        let over = iterated(tokens).filter(|_| loops).unwrap_or_default();
        let goes_on = |rest: &[Token]| rest.first().is_none_or(|next| next.is("|"));
        content_at(over, &names).any(goes_on) || content_at(tokens, &names).any(filtered)
    })
}

/// What follows each mention of a message's content.
fn content_at<'a>(tokens: &'a [Token<'a>], names: &HashSet<&str>) -> impl Iterator<Item = &'a [Token<'a>]> {
    (0..tokens.len()).filter_map(|i| {
        let (before, token, after) = (i.checked_sub(1).map(|i| &tokens[i]), &tokens[i], &tokens[i + 1..]);
        match token.kind {
            // An attribute, or a variable of its own.
            Kind::Name if token.text == "content" || !before.is_some_and(|it| it.is(".")) => {
                names.contains(token.text).then_some(after)
            }
            Kind::Text if token.text == "content" && before.is_some_and(|it| it.is("[")) => {
                after.split_first().filter(|(next, _)| next.is("]")).map(|(_, rest)| rest)
            }
            // `message.get('content')`
            Kind::Text if token.text == "content" && i >= 2 && tokens[i - 2].is_name("get") => {
                after.iter().position(|next| next.is(")")).map(|end| &after[end + 1..])
            }
            _ => None,
        }
    })
}

fn filtered(rest: &[Token]) -> bool {
    matches!(rest, [bar, filter, ..] if bar.is("|") && ["selectattr", "rejectattr", "map"].contains(&filter.text))
}

/// The tags of a template. Comments and raw blocks hold none.
pub(super) fn tags(source: &str) -> Vec<Tag<'_>> {
    let (mut tags, mut at) = (Vec::new(), 0);
    while let Some(open) = source[at..].find('{').map(|found| at + found) {
        let inner = open + 2;
        at = match &source.as_bytes()[open..] {
            [b'{', b'#', ..] => source[inner..].find("#}").map_or(source.len(), |end| inner + end + 2),
            [b'{', kind @ (b'%' | b'{'), ..] => {
                let statement = *kind == b'%';
                let (tokens, end) = tokens(source, inner, if statement { "%}" } else { "}}" });
                let raw = statement && matches!(&tokens[..], [name] if name.is_name("raw"));
                tags.push(Tag { statement, tokens, start: open, end });
                if raw { end_of_raw(source, end) } else { end }
            }
            _ => open + 1,
        };
    }
    tags
}

/// Where the tag `endraw` begins.
fn end_of_raw(source: &str, start: usize) -> usize {
    let begins =
        |at: &usize| source[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw");
    source[start..].match_indices("{%").map(|(at, _)| start + at).find(begins).unwrap_or(source.len())
}

/// The tokens up to `close`, and where it ends. Braces inside belong to mappings.
fn tokens<'a>(source: &'a str, start: usize, close: &str) -> (Vec<Token<'a>>, usize) {
    let (mut tokens, mut at, mut open) = (Vec::new(), start, 0usize);
    while let Some(c) = source[at..].chars().next() {
        let rest = &source[at..];
        if open == 0 && rest.starts_with(close) {
            return (tokens, at + close.len());
        }
        // Marks for blanks at the edges.
        let edge = matches!(c, '-' | '+') && (at == start || (open == 0 && rest[1..].starts_with(close)));
        let (kind, length) = match c {
            '"' | '\'' => (Kind::Text, text_length(rest, c)),
            c if c.is_alphanumeric() || c == '_' => {
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
                (Kind::Name, end.unwrap_or(rest.len()))
            }
            c => (Kind::Other, c.len_utf8()),
        };
        match c {
            '{' | '[' | '(' => open += 1,
            '}' | ']' | ')' => open = open.saturating_sub(1),
            _ => {}
        }
        if !c.is_whitespace() && !edge {
            let inside = if kind == Kind::Text { 1 } else { 0 };
            let text = rest[..length].get(inside..length - inside).unwrap_or_default();
            tokens.push(Token { kind, text, at: at..at + length });
        }
        at += length;
    }
    (tokens, source.len())
}

/// Length of a text with its quotes; an open one ends with the source.
fn text_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_rewritten_and_texts_that_look_like_them_stay() {
        for (source, expected) in [
            ("{% generation %}a{% endgeneration %}", "{% with %}a{% endwith %}"),
            ("{%- generation-%}a{%+ endgeneration -%}", "{%- with-%}a{%+ endwith -%}"),
            (
                "{{ '{% generation %}' }}{# {% generation %} #}",
                "{{ '{% generation %}' }}{# {% generation %} #}",
            ),
            (
                "{% raw %}{% generation %}{% endraw %}{{ {'a': {}} }}",
                "{% raw %}{% generation %}{% endraw %}{{ {'a': {}} }}",
            ),
            ("{%- for x in y[a if b else c] if x -%}", "{%- for x in (y[a if b else c])|iterated if x -%}"),
            (
                "{% for x in y recursive %}{% for x in %}",
                "{% for x in (y)|iterated recursive %}{% for x in %}",
            ),
            ("a\r\n{% raw %}\rb", "a\n{% raw %}\n\nb"),
            ("{% set generation = 1 %}{{ generation }}{", "{% set generation = 1 %}{{ generation }}{"),
        ] {
            assert_eq!(for_engine(source), expected);
        }
    }

    #[test]
    fn a_template_iterates_where_it_loops_over_the_content() {
        for source in [
            "{% for part in message.content %}",
            "{%- for part in message['content'] if part.type == 'text' -%}",
            "{% set parts = m[\"content\"] %}{% for part in parts %}",
            "{% set c = m.get('content', '') %}{% for part in c %}",
            "{% macro render(content) %}{% for item in content %}",
            "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}",
        ] {
            assert!(iterates_over_content(source), "{source}");
        }
        for source in [
            "{{ message.content }}",
            "{% for message in messages %}{{ message['content'] }}",
            "{% for line in message.content.split('\\n') %}",
            "{% if message.content is string %}{% set content = message.content %}{% endif %}{{ content | trim }}",
            "{# {% for part in message.content %} #}",
            "{% for call in message.tool_calls %}{{ 'for x in content' }}",
        ] {
            assert!(!iterates_over_content(source), "{source}");
        }
    }
}
