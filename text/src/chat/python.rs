//! Values as Python writes them: `str()`, `repr()` and what counts as a blank.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

use super::limits::{Paid, charge};

/// Templates can nest values as deep as they like; a stack cannot.
pub(super) const DEEPEST: usize = 128;

/// `str(value)`. An undefined value is nothing, as Jinja prints it. Cut short where the limits are reached, which ends the
/// template.
pub(super) fn str_of(value: &Value) -> String {
    let mut out = Paid::default();
    match value.as_str() {
        Some(text) => out.write_str(text).ok(),
        None => write!(out, "{}", Repr(value)).ok(),
    };
    out.0
}

/// `repr(value)`.
pub(super) struct Repr<'a>(pub &'a Value);

impl fmt::Display for Repr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        repr(self.0, f, 0)
    }
}

fn repr(value: &Value, f: &mut fmt::Formatter, depth: usize) -> fmt::Result {
    match value.kind() {
        _ if charge(0).is_err() => Err(fmt::Error),
        _ if depth > DEEPEST => f.write_str("..."),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(float) => f.write_str(&float_repr(float)),
            Err(_) => write!(f, "{value}"),
        },
        ValueKind::Undefined if depth > 0 => f.write_str("Undefined"),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), f),
        ValueKind::Seq | ValueKind::Iterable => {
            f.write_char('[')?;
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                f.write_str(if i > 0 { ", " } else { "" })?;
                repr(&item, f, depth + 1)?;
            }
            f.write_char(']')
        }
        ValueKind::Map => {
            f.write_char('{')?;
            for (i, (key, item)) in pairs(value).into_iter().enumerate() {
                f.write_str(if i > 0 { ", " } else { "" })?;
                repr(&key, f, depth + 1)?;
                f.write_str(": ")?;
                repr(&item, f, depth + 1)?;
            }
            f.write_char('}')
        }
        _ => write!(f, "{value}"),
    }
}

/// Keys and values of a mapping, in its order.
pub(super) fn pairs(map: &Value) -> Vec<(Value, Value)> {
    let object = map.as_object();
    object.and_then(|object| object.try_iter_pairs()).into_iter().flatten().collect()
}

/// The shortest digits that give the number back, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() || value.is_infinite() {
        let sign = if value.is_sign_negative() && value.is_infinite() { "-" } else { "" };
        return format!("{sign}{}", if value.is_nan() { "nan" } else { "inf" });
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn string_repr(text: &str, f: &mut fmt::Formatter) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    f.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            '\\' => f.write_str("\\\\")?,
            c if c == quote => write!(f, "\\{c}")?,
            c if printable(c) => f.write_char(c)?,
            c => match u32::from(c) {
                code @ 0..=0xff => write!(f, "\\x{code:02x}")?,
                code @ 0x100..=0xffff => write!(f, "\\u{code:04x}")?,
                code => write!(f, "\\U{code:08x}")?,
            },
        }
    }
    f.write_char(quote)
}

/// `str.isprintable`: the blank is the only separator that is.
fn printable(c: char) -> bool {
    // A letter before, since a combining mark is escaped at the beginning of a text only.
    let mut text = [0; 8];
    text[0] = b'a';
    let end = 1 + c.encode_utf8(&mut text[1..]).len();
    let escaped = std::str::from_utf8(&text[..end]).is_ok_and(|text| text.escape_debug().count() > 2);
    let separator = c.is_whitespace() && c != ' ';
    (!escaped && !separator) || matches!(c, '"' | '\'' | '\\')
}

/// The values of a call's parameters, given in order or by name; undefined where they are not given.
pub(super) fn arguments<const N: usize>(given: &[Value], names: [&str; N]) -> Result<[Value; N], Error> {
    let (ordered, named): (Rest<Value>, Kwargs) = from_args(given)?;
    if ordered.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut values = [const { Value::UNDEFINED }; N];
    for (i, name) in names.into_iter().enumerate() {
        values[i] = match ordered.get(i) {
            Some(value) => value.clone(),
            None => named.get::<Option<Value>>(name)?.unwrap_or_default(),
        };
    }
    named.assert_all_used()?;
    Ok(values)
}

/// A number of blanks; less than nothing is nothing.
pub(super) fn width(value: &Value) -> Result<usize, Error> {
    const WIDEST: i64 = 1 << 16;
    match i64::try_from(value.clone())?.max(0) {
        width if width <= WIDEST => Ok(width as usize),
        width => Err(failed(format!("expected a width of at most {WIDEST}, got {width}"))),
    }
}

pub(super) fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `str.isspace` of one character: Unicode's blanks and the four separators of ASCII.
pub(super) fn blank(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_are_written_as_python_writes_them() {
        for (value, expected) in [
            (1.0, "1.0"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (-1.5e300, "-1.5e+300"),
            (1e15, "1000000000000000.0"),
            (-0.0, "-0.0"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_repr(value), expected);
        }
        let text = Value::from("it's\n\"é\u{301}\u{a0}\u{7}\u{200b}\u{10ffff}");
        assert_eq!(Repr(&text).to_string(), r#"'it\'s\n"é́\xa0\x07\u200b\U0010ffff'"#);
        assert_eq!(Repr(&Value::from("it's")).to_string(), r#""it's""#);
    }

    #[test]
    fn a_value_deeper_than_any_text_is_cut_and_not_a_crash() {
        let deep = (0..100_000).fold(Value::from(1), |inner, _| Value::from(vec![inner]));
        assert!(str_of(&deep).contains("[...]"));
        // Values drop from the inside too.
        std::mem::forget(deep);
    }
}
