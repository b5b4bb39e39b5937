//! Jinja's filters and tests where the engine's own differ from those of Python's Jinja.

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error};

use super::json::to_json;
use super::limits::charge;
use super::numbers;
use super::python::{arguments, blank, failed, pairs, str_of, width};
use super::text_methods::{cased, lines};

pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", str_of);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("title", title);
    environment.add_filter("trim", trim);
    environment.add_filter("list", list);
    environment.add_test("sequence", |value: &Value| has_length(value));
    environment.add_test("iterable", |value: &Value| has_length(value));
    environment.add_filter("iterated", iterated);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("first", |value: &Value| {
        items(value).map(|items| items.into_iter().next().unwrap_or_default())
    });
    environment.add_filter("items", pairs_of);
    environment.add_filter("replace", replace);
    numbers::add_to(environment);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment
        .add_test("lower", |value: &Value| cased(&str_of(value), char::is_uppercase, char::is_lowercase));
    environment
        .add_test("upper", |value: &Value| cased(&str_of(value), char::is_lowercase, char::is_uppercase));
    environment
        .add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
}

/// What Python can measure and go through: an undefined value is an empty one.
fn has_length(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
}

/// Items of what Python can go through: characters of a text, keys of a mapping.
fn items(value: &Value) -> Result<Vec<Value>, Error> {
    match (value.as_str(), has_length(value)) {
        (Some(text), _) => {
            charge(text.len().saturating_mul(32))?;
            Ok(text.chars().map(Value::from).collect())
        }
        (None, true) => value.try_iter()?.map(|item| charge(32).map(|()| item)).collect(),
        (None, false) if value.is_none() => Err(failed("'NoneType' object is not iterable")),
        (None, false) => Err(failed(format!("a value of type {} is not iterable", value.kind()))),
    }
}

/// What a loop goes through, as it is.
fn iterated(value: Value) -> Result<Value, Error> {
    // What would be made while the loop goes is made before, and paid for.
    let is_made = has_length(&value) && value.kind() != ValueKind::Iterable;
    if is_made { Ok(value) } else { items(&value).map(Value::from) }
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.len() {
        Some(length) => Ok(length),
        None => items(value).map(|items| items.len()),
    }
}

fn pairs_of(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Map => {
            Ok(pairs(value).into_iter().map(|(key, item)| Value::from(vec![key, item])).collect())
        }
        ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
        kind => Err(failed(format!("items: expected a mapping, got a value of type {kind}"))),
    }
}

fn replace(value: &Value, options: Rest<Value>) -> Result<String, Error> {
    let [old, new, count] = arguments(&options, ["old", "new", "count"])?;
    let (text, old, new) = (str_of(value), str_of(&old), str_of(&new));
    charge(replaced_bytes(&text, &old, &new))?;
    Ok(match count.is_undefined() || count.is_none() {
        true => text.replace(&old, &new),
        false => text.replacen(&old, &new, usize::try_from(count)?),
    })
}

/// Bytes of the text with every `old` replaced by `new`.
pub(super) fn replaced_bytes(text: &str, old: &str, new: &str) -> usize {
    let count = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() };
    text.len() + count.saturating_mul(new.len())
}

fn list(value: &Value) -> Result<Value, Error> {
    items(value).map(Value::from)
}

fn join(value: &Value, options: Rest<Value>) -> Result<String, Error> {
    let [between, attribute] = arguments(&options, ["d", "attribute"])?;
    let text = |item: Value| match attribute.as_str() {
        None if attribute.is_undefined() => Ok(str_of(&item)),
        None => item.get_item(&attribute).map(|it| str_of(&it)),
        Some(path) => path.split('.').try_fold(item, |item, name| item.get_attr(name)).map(|it| str_of(&it)),
    };
    let texts = items(value)?.into_iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let between = str_of(&between);
    charge(texts.len().saturating_mul(between.len() + 24))?;
    Ok(texts.join(&between))
}

fn indent(value: &Value, options: Rest<Value>) -> Result<String, Error> {
    let [by, first, blank] = arguments(&options, ["width", "first", "blank"])?;
    let by = match by.as_str() {
        Some(text) => text.to_owned(),
        None if by.is_undefined() => " ".repeat(4),
        None => " ".repeat(width(&by)?),
    };
    let text = str_of(value) + "\n";
    charge(lines(&text, false).len().saturating_mul(by.len() + 16) + text.len())?;
    let mut out = if first.is_true() { by.clone() } else { String::new() };
    for (i, line) in lines(&text, false).into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
            out += if blank.is_true() || !line.is_empty() { &by } else { "" };
        }
        out += line;
    }
    Ok(out)
}

fn title(value: &Value) -> String {
    let mut begins = true;
    let mut out = String::new();
    for c in str_of(value).chars() {
        if begins {
            out.extend(c.to_uppercase())
        } else {
            out.extend(c.to_lowercase())
        }
        begins = blank(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn trim(value: &Value, options: Rest<Value>) -> Result<String, Error> {
    let [chars] = arguments(&options, ["chars"])?;
    let chars = chars.as_str();
    let text = str_of(value);
    Ok(text.trim_matches(|c| chars.map_or_else(|| blank(c), |chars| chars.contains(c))).to_owned())
}
