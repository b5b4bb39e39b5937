//! `json.dumps`, which is the filter `tojson` of chat templates.

use std::fmt::Write;

use minijinja::Error;
use minijinja::value::{Rest, Value, ValueKind};

use super::limits::charge;
use super::python::{DEEPEST, arguments, failed, float_repr, pairs, width};

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(value: &Value, options: Rest<Value>) -> Result<String, Error> {
    let [ensure_ascii, indent, separators, sort_keys] =
        arguments(&options, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match (indent.is_undefined() || indent.is_none(), indent.as_str()) {
        (true, _) => None,
        (_, Some(text)) => {
            width(&Value::from(text.len()))?;
            Some(text.to_owned())
        }
        (_, None) => Some(" ".repeat(width(&indent)?)),
    };
    let (item, key) = match separators.is_undefined() || separators.is_none() {
        true => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        false => (text_at(&separators, 0)?, text_at(&separators, 1)?),
    };
    let (ensure_ascii, sort_keys) = (ensure_ascii.is_true(), sort_keys.is_true());
    let mut writer = Writer { out: String::new(), ensure_ascii, sort_keys, indent, item, key, paid: 0 };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn text_at(separators: &Value, index: usize) -> Result<String, Error> {
    let text = separators.get_item_by_index(index)?;
    text.as_str().map(str::to_owned).ok_or_else(|| failed("separators: expected two texts"))
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    /// What stands between two items, and behind a key.
    item: String,
    key: String,
    /// Bytes of `out` that were charged.
    paid: usize,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        charge(self.out.len() - self.paid)?;
        self.paid = self.out.len();
        if depth > DEEPEST {
            return Err(failed(format!("tojson: nested deeper than {DEEPEST}")));
        }
        match value.kind() {
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.out += &scalar(value),
            kind => return Err(failed(format!("tojson: a value of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in list.try_iter()? {
            self.begin(empty, depth + 1);
            self.value(&item, depth + 1)?;
            empty = false;
        }
        self.end(empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let named = |(key, value): (Value, Value)| match key.kind() {
            ValueKind::String => Ok((key.to_string(), value)),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => Ok((scalar(&key), value)),
            kind => Err(failed(format!("tojson: a key of type {kind}"))),
        };
        let mut entries = pairs(map).into_iter().map(named).collect::<Result<Vec<_>, _>>()?;
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.out.push('{');
        let empty = entries.is_empty();
        for (i, (key, value)) in entries.iter().enumerate() {
            self.begin(i == 0, depth + 1);
            self.text(key);
            self.out += &self.key;
            self.value(value, depth + 1)?;
        }
        self.end(empty, depth, '}');
        Ok(())
    }

    fn begin(&mut self, first: bool, depth: usize) {
        if !first {
            self.out += &self.item;
        }
        self.line(depth);
    }

    fn end(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out += indent);
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                c if c < ' ' || (self.ensure_ascii && (!c.is_ascii() || c == '\u{7f}')) => {
                    let units = &mut [0; 2];
                    for unit in c.encode_utf16(units) {
                        write!(self.out, "\\u{unit:04x}").ok();
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn scalar(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.to_string().to_lowercase(),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(float) if float.is_nan() => "NaN".into(),
            Ok(float) if float.is_infinite() => format!("{}Infinity", if float < 0.0 { "-" } else { "" }),
            Ok(float) => float_repr(float),
            Err(_) => value.to_string(),
        },
        _ => value.to_string(),
    }
}
