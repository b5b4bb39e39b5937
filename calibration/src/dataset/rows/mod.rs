//! The file formats, each to rows of text, read as a stream.

mod json;
mod parquet;
mod text;

use std::path::Path;

use serde_json::{Map, Value};

pub(super) use self::parquet::visit_parquet;
use super::fields::{Field, Render};
use super::open::Kind;
use crate::error::{Error, Result};

/// A part of a row, in the row's order; those of a text file are long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece<'a> {
    pub text: &'a str,
    /// Whether a row begins here.
    pub begins_row: bool,
}

impl<'a> Piece<'a> {
    /// A row in one piece.
    pub(crate) fn row(text: &'a str) -> Self {
        Self { text, begins_row: true }
    }
}

/// Gets the pieces of all rows in their order.
pub(crate) type Visit<'v> = dyn FnMut(Piece) -> Result<()> + 'v;

/// How rows with fields become text.
pub(super) struct Reading<'a> {
    pub text_field: Option<&'a str>,
    pub render: &'a Render,
}

/// All rows of one file, read by its kind.
pub(super) fn visit_file(path: &Path, reading: &Reading, visit: &mut Visit) -> Result<()> {
    match Kind::of(path) {
        Some(Kind::Parquet) => {
            let file = gptq_input::open(path).map_err(Error::io(path))?;
            visit_parquet(file, &path.display().to_string(), reading, visit)
        }
        Some(Kind::JsonLines | Kind::Json) => json::visit(path, reading, visit),
        Some(Kind::Text) if reading.text_field.is_some() => {
            Err(Error::malformed(path.display(), "a text file has no fields, but --text-field was given"))
        }
        Some(Kind::Text) => text::visit(path, visit),
        None => Err(Error::malformed(path.display(), format!("expected {}", Kind::EXPECTED))),
    }
}

/// Rows that are objects, one after the other.
struct ObjectRows<'a, 'v> {
    reading: &'a Reading<'a>,
    field: Option<Field>,
    visit: &'a mut Visit<'v>,
}

impl<'a, 'v> ObjectRows<'a, 'v> {
    fn new(reading: &'a Reading<'a>, visit: &'a mut Visit<'v>) -> Self {
        Self { reading, field: None, visit }
    }

    /// The first row decides which field is read. `at` names the row.
    fn push(&mut self, row: Value, at: &dyn Fn() -> String) -> Result<()> {
        let Value::Object(mut row) = row else {
            return Err(Error::malformed(at(), "expected an object with the field `text`"));
        };
        let field = match &mut self.field {
            Some(field) => field,
            none => none.insert(
                Field::choose(&names(&row), self.reading.text_field)
                    .map_err(|problem| Error::malformed(at(), problem))?,
            ),
        };
        let text = field.text(&mut row, self.reading.render);
        let text = text.map_err(|problem| Error::malformed(at(), problem))?;
        (self.visit)(Piece::row(&text))
    }
}

fn names(row: &Map<String, Value>) -> Vec<(String, bool)> {
    row.iter().map(|(name, value)| (name.clone(), value.is_array())).collect()
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// Rows of a file of this name and content, read by a template that writes the first message's content.
    pub fn rows(name: &str, bytes: &[u8], text_field: Option<&str>) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        collect(text_field, |reading, visit| visit_file(&path, reading, visit))
    }

    pub fn collect(
        text_field: Option<&str>,
        read: impl FnOnce(&Reading, &mut Visit) -> Result<()>,
    ) -> Result<Vec<String>> {
        let render = |messages: &[Value]| Ok(format!("<{}>", messages[0]["content"].as_str().unwrap()));
        let mut rows: Vec<String> = Vec::new();
        read(&Reading { text_field, render: &render }, &mut |piece| {
            match piece.begins_row {
                true => rows.push(piece.text.to_owned()),
                false => rows.last_mut().unwrap().push_str(piece.text),
            }
            Ok(())
        })?;
        Ok(rows)
    }
}
