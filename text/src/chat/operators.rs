//! Operators that make something larger than what they are given, written as calls of ours, which know the limits.
//!
//! | template | engine |
//! | --- | --- |
//! | `a + b`, `a ~ b`, `a * b` | `summed(a, b)`, `joined(a, b)`, `multiplied(a, b)` |
//! | `a == b`, `a < b` and the like | `a\|measured == b`, unless one of them is a literal |
//! | `a in b` | `a\|measured in b\|measured` |
//! | `a[b:c]` | `a.sliced(b, c, none)` |
//!
//! A run of one operator becomes one call, so that no expression gets deeper. Everything else stays as it is written.

use super::source::{Kind, Token};

/// A token, or what lies in brackets.
struct Piece {
    text: String,
    start: usize,
    end: usize,
    role: Role,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// A text, a number or a constant.
    Literal,
    /// A name or brackets: what may end an operand, as a literal does.
    Operand,
    /// `.`, `|`, a sign, `is`: what belongs to an operand and does not end it.
    Inside,
    Operator,
    /// What binds less than any operator. The text says whether it compares.
    Separator,
    /// The `in` of a loop, which compares nothing.
    Over,
}

const BINARY: [&[&str]; 3] = [&["+", "-"], &["~"], &["*", "/", "//", "%"]];
const CALLS: [(&str, &str); 3] = [("+", "summed"), ("~", "joined"), ("*", "multiplied")];
const COMPARISONS: [&str; 6] = ["==", "!=", "<", "<=", ">", ">="];
const KEYWORDS: [&str; 6] = ["and", "or", "not", "if", "else", "in"];
const CONSTANTS: [&str; 6] = ["true", "false", "none", "True", "False", "None"];

/// The tokens of a tag, from the first to the last.
pub(super) fn as_calls(source: &str, tokens: &[Token], statement: bool) -> String {
    let mut pieces = pieces(source, tokens);
    if statement && let Some(first) = pieces.first_mut() {
        let is_loop = first.text == "for";
        first.role = Role::Separator;
        if is_loop {
            if let Some(over) = pieces.iter_mut().find(|piece| piece.text == "in") {
                over.role = Role::Over;
            }
            if let Some(last) = pieces.last_mut().filter(|last| last.text == "recursive") {
                last.role = Role::Separator;
            }
        }
    }
    level(source, &pieces)
}

/// What the brackets of one level hold.
fn level(source: &str, pieces: &[Piece]) -> String {
    let parts = |role| matches!(role, Role::Separator | Role::Over);
    let separators = (0..pieces.len()).filter(|i| parts(pieces[*i].role));
    let ends = separators.chain([pieces.len()]);
    let mut segments = Vec::new();
    let mut start = 0;
    for end in ends {
        segments.push(&pieces[start..end]);
        start = end + 1;
    }
    let lone = |i: usize| matches!(segments.get(i), Some([one]) if one.role == Role::Literal);
    let between = |i: usize| segments[..i].iter().map(|it| it.len() + 1).sum::<usize>().checked_sub(1);
    let separator = |i: usize| {
        let piece = between(i).and_then(|at| pieces.get(at)).filter(|piece| piece.role == Role::Separator);
        piece.map_or("", |piece| &piece.text)
    };
    let mut out = String::new();
    let mut last = pieces.first().map_or(0, |first| first.start);
    for (i, segment) in segments.iter().enumerate() {
        if let Some(piece) = between(i).and_then(|at| pieces.get(at)) {
            out += &source[last..piece.start];
            out += &piece.text;
            last = piece.end;
        }
        let (Some(from), Some(to)) = (segment.first(), segment.last()) else { continue };
        out += &source[last..from.start];
        out += &operation(source, segment, 0);
        last = to.end;
        let (before, after) = (separator(i), if i + 1 < segments.len() { separator(i + 1) } else { "" });
        let compared = COMPARISONS.contains(&after) && !lone(i + 1);
        // `a not in b` has nothing between `not` and `in`.
        let sought = after == "in" || (after == "not" && segments[i + 1].is_empty());
        if !lone(i) && (compared || sought || before == "in") {
            out += "|measured";
        }
    }
    out
}

/// An operation of the given rank, of those that bind least first.
fn operation(source: &str, pieces: &[Piece], rank: usize) -> String {
    let Some(operators) = BINARY.get(rank) else {
        return joined(source, pieces);
    };
    let is_ours =
        |i: &usize| pieces[*i].role == Role::Operator && operators.contains(&pieces[*i].text.as_str());
    let places: Vec<usize> = (0..pieces.len()).filter(is_ours).collect();
    let ends = places.iter().copied().skip(1).chain([pieces.len()]);
    let first = places.first().copied().unwrap_or(pieces.len());
    let mut out = operation(source, &pieces[..first], rank + 1);
    let mut open = "";
    for (at, end) in places.iter().copied().zip(ends) {
        let operator = &pieces[at];
        let call = CALLS.iter().find(|(symbol, _)| *symbol == operator.text).map_or("", |(_, call)| *call);
        if open != call {
            if !open.is_empty() {
                out.push(')');
            }
            if !call.is_empty() {
                out.insert(0, '(');
                out.insert_str(0, call);
            }
            open = call;
        }
        out += &source[pieces[at - 1].end..operator.start];
        out += if call.is_empty() { &operator.text } else { "," };
        out += pieces.get(at + 1).map_or("", |next| &source[operator.end..next.start]);
        out += &operation(source, &pieces[at + 1..end], rank + 1);
    }
    out + if open.is_empty() { "" } else { ")" }
}

/// Pieces with what stands between them.
fn joined(source: &str, pieces: &[Piece]) -> String {
    let mut out = String::new();
    for (i, piece) in pieces.iter().enumerate() {
        if i > 0 {
            out += &source[pieces[i - 1].end..piece.start];
        }
        out += &piece.text;
    }
    out
}

fn pieces(source: &str, tokens: &[Token]) -> Vec<Piece> {
    let (mut pieces, mut at) = (Vec::<Piece>::new(), 0);
    // Behind `is` stand names that are no keywords.
    let mut test = false;
    while let Some(token) = tokens.get(at) {
        let (start, mut end) = (token.at.start, token.at.end);
        let before = pieces.last();
        let ends_operand = before.is_some_and(|it| matches!(it.role, Role::Literal | Role::Operand));
        let attribute = before.is_some_and(|it| it.text == "." || it.text == "|");
        let mut taken = 1;
        let mut text = source[start..end].to_owned();
        let role = match token.kind {
            Kind::Text => Role::Literal,
            Kind::Name if test => {
                test = token.text == "not";
                if test { Role::Inside } else { Role::Operand }
            }
            Kind::Name if attribute => Role::Operand,
            Kind::Name if token.text == "is" => {
                test = true;
                Role::Inside
            }
            Kind::Name if KEYWORDS.contains(&token.text) => Role::Separator,
            Kind::Name if CONSTANTS.contains(&token.text) => Role::Literal,
            Kind::Name if token.text.starts_with(|c: char| c.is_ascii_digit()) => Role::Literal,
            Kind::Name => Role::Operand,
            Kind::Other => match token.text {
                "(" | "[" | "{" => {
                    let close = closing(tokens, at);
                    let inner = &tokens[at + 1..close];
                    taken = close - at + 1;
                    end = tokens.get(close).map_or_else(|| tokens[close - 1].at.end, |close| close.at.end);
                    if let (Some(first), Some(last)) = (inner.first(), inner.last()) {
                        let inner = self::pieces(source, inner);
                        let is_slice = token.text == "[" && ends_operand && inner.iter().any(colon);
                        text = match is_slice {
                            true => slice(source, &inner),
                            false => [
                                &source[start..first.at.start],
                                &level(source, &inner),
                                &source[last.at.end..end],
                            ]
                            .concat(),
                        };
                    } else {
                        text = source[start..end].to_owned();
                    }
                    Role::Operand
                }
                symbol => {
                    let next =
                        tokens.get(at + 1).filter(|next| next.at.start == end).map_or("", |it| it.text);
                    if matches!((symbol, next), ("=" | "!" | "<" | ">", "=") | ("*", "*") | ("/", "/")) {
                        taken = 2;
                        end += 1;
                        text = source[start..end].to_owned();
                    }
                    match text.as_str() {
                        "+" if exponent(before, start) => Role::Inside,
                        "+" | "-" | "~" | "*" | "/" | "//" | "%" if ends_operand => Role::Operator,
                        "=" | "," | ":" => Role::Separator,
                        symbol if COMPARISONS.contains(&symbol) => Role::Separator,
                        _ => Role::Inside,
                    }
                }
            },
        };
        pieces.push(Piece { text, start, end, role });
        at += taken;
    }
    pieces
}

fn colon(piece: &Piece) -> bool {
    piece.role == Role::Separator && piece.text == ":"
}

/// A slice as a call of a method, which belongs to the operand before it as the brackets did.
fn slice(source: &str, inner: &[Piece]) -> String {
    let parts = inner.split(colon).map(|part| match part {
        [] => "none".into(),
        part => level(source, part),
    });
    let mut parts: Vec<String> = parts.collect();
    parts.resize(parts.len().max(3), "none".into());
    format!(".sliced({})", parts.join(", "))
}

/// Whether a sign at `start` belongs to a number, as in `1e+5`.
fn exponent(before: Option<&Piece>, start: usize) -> bool {
    before.is_some_and(|it| it.role == Role::Literal && it.end == start && it.text.ends_with(['e', 'E']))
}

/// Where the bracket that opens at `open` closes; behind the last token where it does not.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(open).filter(|(_, token)| token.kind == Kind::Other) {
        match token.text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    tokens.len()
}
