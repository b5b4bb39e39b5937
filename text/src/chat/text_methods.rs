//! Python's methods on texts.

use minijinja::value::Value;
use minijinja::{Error, ErrorKind, FormatStyle, format_filter};

use super::filters::replaced_bytes;
use super::limits::charge;
use super::operations::charge_format;
use super::python::{arguments, blank, failed, width};

/// A text, for the methods that Python has for it.
pub(super) struct Text<'a>(pub &'a str);

impl<'a> Text<'a> {
    pub(super) fn call(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        // For going through it, and for a text of the same size.
        charge(self.0.len().saturating_mul(2))?;
        match method {
            "strip" | "lstrip" | "rstrip" => self.strip(method, args),
            "split" | "rsplit" => self.split(method, args),
            "partition" | "rpartition" => self.partition(method, args),
            "startswith" | "endswith" => self.edge(method, args),
            "find" | "rfind" | "index" | "rindex" | "count" => self.find(method, args),
            "center" | "ljust" | "rjust" | "zfill" => self.padded(method, args),
            "format" => {
                charge_format(self.0, args)?;
                format_filter(FormatStyle::StrFormat, self.0, args).map(Value::from)
            }
            "removeprefix" | "removesuffix" => {
                let [affix] = arguments(args, ["affix"])?;
                let affix = text(&affix)?;
                let cut = if method == "removeprefix" {
                    self.0.strip_prefix(affix)
                } else {
                    self.0.strip_suffix(affix)
                };
                Ok(Value::from(cut.unwrap_or(self.0)))
            }
            "replace" => {
                let [old, new, count] = arguments(args, ["old", "new", "count"])?;
                let count = if count.is_undefined() { -1 } else { i64::try_from(count)? };
                charge(replaced_bytes(self.0, text(&old)?, text(&new)?))?;
                Ok(Value::from(match usize::try_from(count) {
                    Ok(count) => self.0.replacen(text(&old)?, text(&new)?, count),
                    Err(_) => self.0.replace(text(&old)?, text(&new)?),
                }))
            }
            "join" => {
                let [items] = arguments(args, ["iterable"])?;
                let item = |item: Value| match item.as_str() {
                    Some(text) => Ok(text.to_owned()),
                    None => Err(failed(format!("join: expected texts, found a {}", item.kind()))),
                };
                let paid = |text: String| charge(text.len() + self.0.len() + 24).map(|()| text);
                let texts = items.try_iter()?.map(|it| item(it).and_then(paid));
                Ok(Value::from(texts.collect::<Result<Vec<_>, _>>()?.join(self.0)))
            }
            "splitlines" => {
                let [keep] = arguments(args, ["keepends"])?;
                charge(self.0.len().saturating_mul(32))?;
                Ok(lines(self.0, keep.is_true()).into_iter().map(Value::from).collect())
            }
            _ => {
                let [] = arguments(args, [])?;
                self.plain(method)
            }
        }
    }

    /// Methods without arguments.
    fn plain(&self, method: &str) -> Result<Value, Error> {
        let all = |holds: fn(char) -> bool| Value::from(!self.0.is_empty() && self.0.chars().all(holds));
        Ok(match method {
            "upper" => Value::from(self.0.to_uppercase()),
            "lower" | "casefold" => Value::from(self.0.to_lowercase()),
            "title" => Value::from(self.title()),
            "capitalize" => Value::from(capitalized(self.0)),
            "swapcase" => self.0.chars().map(swapped).collect::<String>().into(),
            "isspace" => all(blank),
            "isdigit" | "isnumeric" | "isdecimal" => all(char::is_numeric),
            "isalnum" => all(char::is_alphanumeric),
            "isalpha" => all(char::is_alphabetic),
            "isascii" => Value::from(self.0.is_ascii()),
            "islower" => cased(self.0, char::is_uppercase, char::is_lowercase).into(),
            "isupper" => cased(self.0, char::is_lowercase, char::is_uppercase).into(),
            "istitle" => Value::from(self.0 == self.title() && self.0.chars().any(char::is_alphabetic)),
            _ => return Err(Error::from(ErrorKind::UnknownMethod)),
        })
    }

    fn strip(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [chars] = arguments(args, ["chars"])?;
        let chars = if chars.is_undefined() || chars.is_none() { None } else { Some(text(&chars)?) };
        let cut = |c: char| chars.map_or_else(|| blank(c), |chars| chars.contains(c));
        Ok(Value::from(match method {
            "lstrip" => self.0.trim_start_matches(cut),
            "rstrip" => self.0.trim_end_matches(cut),
            _ => self.0.trim_matches(cut),
        }))
    }

    fn split(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [separator, most] = arguments(args, ["sep", "maxsplit"])?;
        let most = if most.is_undefined() { -1 } else { i64::try_from(most)? };
        let parts = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
        let from_end = method == "rsplit";
        let pieces: Vec<&str> = if separator.is_undefined() || separator.is_none() {
            self.words(parts, from_end)
        } else {
            match text(&separator)? {
                "" => return Err(failed("empty separator")),
                separator if from_end => {
                    let mut pieces: Vec<_> = self.0.rsplitn(parts, separator).collect();
                    pieces.reverse();
                    pieces
                }
                separator => self.0.splitn(parts, separator).collect(),
            }
        };
        charge(pieces.len().saturating_mul(48))?;
        Ok(pieces.into_iter().map(Value::from).collect())
    }

    /// Split at runs of blanks, into so many parts at most; what remains keeps the blanks inside.
    fn words(&self, parts: usize, from_end: bool) -> Vec<&'a str> {
        let outer = if from_end { self.0.trim_end_matches(blank) } else { self.0.trim_start_matches(blank) };
        let (mut rest, mut words) = (outer, Vec::new());
        while !rest.is_empty() {
            let cut = if from_end { rest.rfind(blank) } else { rest.find(blank) };
            let Some(cut) = cut.filter(|_| words.len() + 1 < parts) else {
                words.push(rest);
                break;
            };
            let (before, after) = rest.split_at(cut);
            let (word, others) = if from_end {
                (after.trim_start_matches(blank), before.trim_end_matches(blank))
            } else {
                (before, after.trim_start_matches(blank))
            };
            words.push(word);
            rest = others;
        }
        if from_end {
            words.reverse();
        }
        words
    }

    fn partition(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [separator] = arguments(args, ["sep"])?;
        let separator = text(&separator)?;
        if separator.is_empty() {
            return Err(failed("empty separator"));
        }
        let parts = if method == "partition" {
            self.0
                .split_once(separator)
                .map_or([self.0, "", ""], |(before, after)| [before, separator, after])
        } else {
            self.0
                .rsplit_once(separator)
                .map_or(["", "", self.0], |(before, after)| [before, separator, after])
        };
        Ok(parts.into_iter().map(Value::from).collect())
    }

    fn edge(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [affix, start] = arguments(args, ["affix", "start"])?;
        let rest = if start.is_undefined() { self.0 } else { self.from(i64::try_from(start)?) };
        let holds = |affix: &Value| -> Result<bool, Error> {
            let affix = text(affix)?;
            Ok(if method == "startswith" { rest.starts_with(affix) } else { rest.ends_with(affix) })
        };
        if affix.as_str().is_some() {
            return holds(&affix).map(Value::from);
        }
        for affix in affix.try_iter()? {
            if holds(&affix)? {
                return Ok(Value::from(true));
            }
        }
        Ok(Value::from(false))
    }

    /// From a character on, counted from the end where negative.
    fn from(&self, start: i64) -> &'a str {
        let length = self.0.chars().count() as i64;
        let start = if start < 0 { (length + start).max(0) } else { start };
        self.0.char_indices().nth(start as usize).map_or("", |(at, _)| &self.0[at..])
    }

    fn find(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [wanted] = arguments(args, ["sub"])?;
        let wanted = text(&wanted)?;
        if method == "count" {
            return Ok(Value::from(self.0.matches(wanted).count()));
        }
        let at = if method.starts_with('r') { self.0.rfind(wanted) } else { self.0.find(wanted) };
        match at {
            Some(at) => Ok(Value::from(self.0[..at].chars().count())),
            None if method.ends_with("index") => Err(failed("substring not found")),
            None => Ok(Value::from(-1)),
        }
    }

    fn padded(&self, method: &str, args: &[Value]) -> Result<Value, Error> {
        let [wanted, fill] = arguments(args, ["width", "fillchar"])?;
        let width = width(&wanted)?;
        let missing = width.saturating_sub(self.0.chars().count());
        let fill = if fill.is_undefined() { " " } else { text(&fill)? };
        charge(missing.saturating_mul(fill.len()))?;
        let (sign, digits) = match self.0.strip_prefix(['+', '-']) {
            Some(digits) if method == "zfill" => (&self.0[..1], digits),
            _ => ("", self.0),
        };
        let left = match method {
            "ljust" => 0,
            "center" => missing / 2 + (missing & width & 1),
            _ => missing,
        };
        let fill = if method == "zfill" { "0" } else { fill };
        Ok(Value::from(format!("{sign}{}{digits}{}", fill.repeat(left), fill.repeat(missing - left))))
    }

    /// Every run of letters with a capital.
    fn title(&self) -> String {
        let mut inside = false;
        let mut out = String::new();
        for c in self.0.chars() {
            if inside {
                out.extend(c.to_lowercase())
            } else {
                out.extend(c.to_uppercase())
            }
            inside = c.is_alphabetic();
        }
        out
    }
}

fn text(value: &Value) -> Result<&str, Error> {
    value.as_str().ok_or_else(|| failed(format!("expected a text, got a value of type {}", value.kind())))
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    first + &chars.as_str().to_lowercase()
}

/// Whether there are letters of the one case, and none of the other.
pub(super) fn cased(text: &str, wrong: fn(char) -> bool, right: fn(char) -> bool) -> bool {
    text.chars().any(right) && !text.chars().any(wrong)
}

fn swapped(c: char) -> String {
    if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    const ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut rest, mut lines) = (text, Vec::new());
    while !rest.is_empty() {
        let line = rest.find(ENDS).unwrap_or(rest.len());
        let end = match &rest[line..] {
            after if after.starts_with("\r\n") => line + 2,
            after => line + after.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { line }]);
        rest = &rest[end..];
    }
    lines
}
