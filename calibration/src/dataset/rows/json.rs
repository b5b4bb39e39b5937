//! Rows as JSON: one object a line, or one array of objects.

use std::cell::Cell;
use std::fmt;
use std::io::BufRead;
use std::path::Path;
use std::rc::Rc;

use serde::de::{DeserializeSeed, Error as _, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::de::{Deserializer, IoRead};

use super::super::open::{MOST_ROW_BYTES, Opened, Row, open};
use super::{ObjectRows, Reading, Visit};
use crate::error::{Error, Result};

pub(super) fn visit(path: &Path, reading: &Reading, visit: &mut Visit) -> Result<()> {
    let mut file = open(path)?;
    let mut rows = ObjectRows::new(reading, visit);
    let blank_lines = skip_blanks(&mut file)?;
    match file.reader.fill_buf() {
        Ok([b'[', ..]) => array(path, file, &mut rows),
        Ok(_) => lines(path, file, blank_lines, &mut rows),
        Err(cause) => Err(file.error(cause)),
    }
}

/// Skips white space; returns how many lines ended in it.
fn skip_blanks(file: &mut Opened) -> Result<usize> {
    let mut lines = 0;
    loop {
        let bytes = match file.reader.fill_buf() {
            Ok(bytes) => bytes,
            Err(cause) => return Err(file.error(cause)),
        };
        let blank = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        lines += bytes[..blank].iter().filter(|byte| **byte == b'\n').count();
        let ended = blank < bytes.len() || bytes.is_empty();
        file.reader.consume(blank);
        if ended {
            return Ok(lines);
        }
    }
}

/// One row a line; blank lines are skipped.
fn lines(path: &Path, mut file: Opened, before: usize, rows: &mut ObjectRows) -> Result<()> {
    let (mut line, mut number) = (Vec::new(), before);
    while file.next_line(&mut line)? {
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let at = || format!("{}:{number}", path.display());
        let row = serde_json::from_slice::<Value>(&line).map_err(|cause| {
            Error::malformed(at(), format!("not JSON at column {} (expected a row a line)", cause.column()))
        })?;
        rows.push(row, &at)?;
    }
    Ok(())
}

/// An array of rows, as whole data sets are published. One row is in memory at a time.
fn array(path: &Path, mut file: Opened, rows: &mut ObjectRows) -> Result<()> {
    let left = Rc::new(Cell::new(MOST_ROW_BYTES));
    let reader = Row { reader: &mut file.reader, left: left.clone() };
    let mut deserializer = Deserializer::new(IoRead::new(reader));
    let mut walk = Walk { path, rows, left, failed: None };
    let read = (&mut walk).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    match (walk.failed.take(), read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(cause)) if cause.is_io() => Err(file.error(cause.into())),
        (None, Err(cause)) => {
            let problem = format!("not JSON at column {} (in an array of rows)", cause.column());
            Err(Error::malformed(format!("{}:{}", path.display(), cause.line()), problem))
        }
    }
}

struct Walk<'w, 'a, 'v> {
    path: &'w Path,
    rows: &'w mut ObjectRows<'a, 'v>,
    /// Bytes that the row may still have.
    left: Rc<Cell<usize>>,
    /// What stopped the walk, where it was not the JSON.
    failed: Option<Error>,
}

impl<'de> DeserializeSeed<'de> for &mut Walk<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &mut Walk<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(row) = rows.next_element::<Value>()? {
            number += 1;
            self.left.set(MOST_ROW_BYTES);
            if let Err(error) = self.rows.push(row, &|| format!("{}, row {number}", self.path.display())) {
                self.failed = Some(error);
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::open::testing::gzip;
    use super::super::testing::rows;
    use crate::error::Result;

    fn message(result: Result<Vec<String>>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn lines_and_arrays_are_the_same_rows() {
        for (name, text) in [
            ("a.jsonl", "{\"text\": \"a\\n\"}\n\n{\"id\": 1, \"text\": \"b\"}\n"),
            ("a.JSONL", "\r\n{\"text\": \"a\\n\"}\r\n{\"text\": \"b\"}"),
            ("a.json", "{\"text\": \"a\\n\"}\n{\"text\": \"b\"}"),
            ("a.json", "\n [{\"text\": \"a\\n\"},\n {\"text\": \"b\"}]\n"),
        ] {
            for bytes in [text.as_bytes().to_vec(), [b"\xef\xbb\xbf", text.as_bytes()].concat()] {
                assert_eq!(rows(name, &bytes, None).unwrap(), ["a\n", "b"], "{name}");
                assert_eq!(
                    rows(&format!("{name}.gz"), &gzip(&bytes), None).unwrap(),
                    ["a\n", "b"],
                    "{name}.gz"
                );
            }
        }
    }

    #[test]
    fn rows_are_read_by_the_field_of_the_first() {
        let chats = br#"{"messages": [{"role": "user", "content": "Hi"}]}
            {"messages": [{"from": "human", "value": "Ho"}]}"#;
        assert_eq!(rows("a.jsonl", chats, None).unwrap(), ["<Hi>", "<Ho>"]);
        let named = b"{\"text\": \"a\", \"body\": \"b\"}\n{\"body\": \"c\"}";
        assert_eq!(rows("a.jsonl", named, Some("body")).unwrap(), ["b", "c"]);
        assert!(
            message(rows("a.jsonl", named, None)).ends_with(":2: no field `text`, which earlier rows have")
        );
    }

    #[test]
    fn the_line_or_row_at_fault_is_named() {
        let good = "{\"text\": \"a\\n\"}\n\n{\"id\": 1, \"text\": \"b\"}\n";
        for (line, expected) in [
            ("{\"text\": ", "x.jsonl:4: not JSON"),
            ("{\"title\": \"a\"}", "x.jsonl:4: no field"),
            ("{\"text\": null}", "x.jsonl:4: the field"),
            ("[\"text\"]", "x.jsonl:4: expected an object"),
        ] {
            let error = message(rows("x.jsonl", format!("{good}{line}").as_bytes(), None));
            assert!(error.contains(expected), "{error}");
        }
        for (text, expected) in [
            ("[{\"text\": \"a\"}, 7]", "x.json, row 2: expected an object"),
            ("[{\"text\": \"a\"},\n {\"text\" 7}]", "x.json:2: not JSON"),
            ("[{\"text\": \"a\"}", "x.json:1: not JSON"),
            ("[{\"text\": \"a\"}] more", "x.json:1: not JSON"),
            ("{\n  \"data\": []\n}", "x.json:1: not JSON"),
            (
                "[{\"a\": 1, \"b\": 2}]",
                "row 1: no field `text`; the fields are a, b: choose one with --text-field",
            ),
        ] {
            let error = message(rows("x.json", text.as_bytes(), None));
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_truncated_archive_is_said_to_be_one() {
        let lines: String = (0..20_000).map(|i| format!("{{\"text\": \"{}\"}},\n", i * i)).collect();
        let packed = gzip(format!("[{lines}").as_bytes());
        let error = message(rows("x.json.gz", &packed[..packed.len() / 2], None));
        assert!(error.contains("truncated gzip"), "{error}");
    }
}
