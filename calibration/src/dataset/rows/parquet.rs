//! The three file formats, each to rows of text.

use std::fmt::Display;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{ChunkReader, FileReader};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::schema::types::SchemaDescriptor;
use serde_json::Value;

use crate::error::{Error, Result};

/// The column (parquet) or field (jsonl) that holds the text.
const TEXT: &str = "text";

/// Rows decoded at a time: it bounds the buffers, whatever row count a file claims.
const BATCH: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Parquet,
    JsonLines,
    Text,
}

impl Kind {
    /// By the file's extension; `None` for every other file.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "parquet" => Some(Self::Parquet),
            "jsonl" => Some(Self::JsonLines),
            "txt" => Some(Self::Text),
            _ => None,
        }
    }
}

/// All rows of one file, read by its kind.
pub(super) fn read_file(path: &Path) -> Result<Vec<String>> {
    let at = path.display().to_string();
    let text = || fs::read_to_string(path).map_err(Error::io(path));
    match Kind::of(path) {
        Some(Kind::Parquet) => parquet_rows(File::open(path).map_err(Error::io(path))?, &at),
        Some(Kind::JsonLines) => json_lines_rows(&text()?, &at),
        // A row keeps its line end, so that the rows in a row are the file.
        Some(Kind::Text) => Ok(text()?.split_inclusive('\n').map(str::to_owned).collect()),
        None => Err(Error::malformed(at, "expected a .parquet, .jsonl or .txt file")),
    }
}

/// The field `text` of each line; blank lines are skipped.
fn json_lines_rows(text: &str, at: &str) -> Result<Vec<String>> {
    let row = |(index, line): (usize, &str)| {
        let at = format!("{at}:{}", index + 1);
        match serde_json::from_str::<Value>(line) {
            Err(cause) => Err(Error::malformed(at, format!("not JSON at column {}", cause.column()))),
            Ok(Value::Object(mut fields)) => match fields.remove(TEXT) {
                Some(Value::String(text)) => Ok(text),
                Some(_) => Err(Error::malformed(at, format!("the field `{TEXT}` is not a string"))),
                None => Err(Error::malformed(at, format!("no field `{TEXT}`"))),
            },
            Ok(_) => Err(Error::malformed(at, format!("expected an object with the field `{TEXT}`"))),
        }
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
}

/// The column `text` of a parquet file; nulls are empty rows. `at` names the file in errors.
pub(super) fn parquet_rows<R: ChunkReader + 'static>(source: R, at: &str) -> Result<Vec<String>> {
    // The parquet crate (60.1) checks most of a file, but panics on some damaged headers.
    catch_unwind(AssertUnwindSafe(|| decode_parquet(source, at)))
        .unwrap_or_else(|_| Err(Error::malformed(at, "damaged parquet file")))
}

fn decode_parquet<R: ChunkReader + 'static>(source: R, at: &str) -> Result<Vec<String>> {
    let malformed = |problem: &dyn Display| Error::malformed(at, problem);
    let reader = SerializedFileReader::new(source).map_err(|cause| malformed(&cause))?;
    let column = text_column(reader.metadata().file_metadata().schema_descr(), at)?;
    let mut rows = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(|cause| malformed(&cause))?;
        match group.get_column_reader(column.index).map_err(|cause| malformed(&cause))? {
            ColumnReader::ByteArrayColumnReader(values) => column.read(values, &mut rows, at)?,
            _ => return Err(malformed(&format!("the column `{TEXT}` changes its type"))),
        }
    }
    Ok(rows)
}

struct TextColumn {
    index: usize,
    /// The definition level of a value that is there; a lower level is a null.
    present: i16,
}

fn text_column(schema: &SchemaDescriptor, at: &str) -> Result<TextColumn> {
    let names =
        || schema.columns().iter().map(|column| column.path().string()).collect::<Vec<_>>().join(", ");
    let index = schema.columns().iter().position(|column| column.path().string() == TEXT);
    let index = index.ok_or_else(|| Error::malformed(at, format!("no column `{TEXT}`, got {}", names())))?;
    let column = schema.column(index);
    if column.physical_type() != PhysicalType::BYTE_ARRAY || column.max_rep_level() != 0 {
        let got = column.physical_type();
        return Err(Error::malformed(
            at,
            format!("expected one string a row in the column `{TEXT}`, got {got}"),
        ));
    }
    Ok(TextColumn { index, present: column.max_def_level() })
}

impl TextColumn {
    /// Appends one row group's rows.
    fn read(
        &self,
        mut reader: ColumnReaderImpl<ByteArrayType>,
        rows: &mut Vec<String>,
        at: &str,
    ) -> Result<()> {
        loop {
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let read = reader.read_records(BATCH, Some(&mut levels), None, &mut values);
            let (records, ..) = read.map_err(|cause| Error::malformed(at, cause))?;
            if records == 0 {
                return Ok(());
            }
            // A column that cannot be null has no levels.
            levels.resize(records, self.present);
            let mut values = values.into_iter();
            for level in levels {
                let value = if level == self.present { values.next() } else { Some(ByteArray::from("")) };
                let text = value.as_ref().and_then(|value| value.as_utf8().ok());
                let text = text.ok_or_else(|| {
                    Error::malformed(
                        at,
                        format!("row {} of the column `{TEXT}` is not UTF-8 text", rows.len() + 1),
                    )
                })?;
                rows.push(text.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use parquet::basic::Compression;
    use parquet::data_type::{DataType, Int32Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// The values of one row group, with their definition levels where the column is optional.
    type Group<T> = (Vec<T>, Option<Vec<i16>>);

    fn parquet<T: DataType>(column: &str, groups: &[Group<T::T>]) -> Bytes {
        compressed::<T>(Compression::SNAPPY, column, groups)
    }

    fn compressed<T: DataType>(compression: Compression, column: &str, groups: &[Group<T::T>]) -> Bytes {
        let schema = Arc::new(parse_message_type(&format!("message schema {{ {column}; }}")).unwrap());
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut file = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
        for (values, levels) in groups {
            let mut group = file.next_row_group().unwrap();
            let mut writer = group.next_column().unwrap().unwrap();
            writer.typed::<T>().write_batch(values, levels.as_deref(), None).unwrap();
            writer.close().unwrap();
            group.close().unwrap();
        }
        file.into_inner().unwrap().into()
    }

    fn strings(values: &[&str]) -> Vec<ByteArray> {
        values.iter().map(|&value| value.into()).collect()
    }

    fn message(result: Result<Vec<String>>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn parquet_rows_keep_their_order_over_row_groups_and_nulls_are_empty() {
        let groups = [(strings(&["a\n", "ü"]), Some(vec![1, 0, 1])), (strings(&["z"]), Some(vec![0, 1]))];
        let file = parquet::<ByteArrayType>("optional binary text (UTF8)", &groups);
        assert_eq!(parquet_rows(file, "x").unwrap(), ["a\n", "", "ü", "", "z"]);
    }

    #[test]
    fn the_hubs_two_compressions_are_read() {
        for compression in [Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            let text = "again and ".repeat(100);
            let groups = [(strings(&[&text]), None)];
            let file = compressed::<ByteArrayType>(compression, "required binary text (UTF8)", &groups);
            assert_eq!(parquet_rows(file, "x").unwrap(), [text]);
        }
    }

    #[test]
    fn a_required_column_longer_than_a_batch_is_read_whole() {
        let expected: Vec<String> = (0..BATCH * 2 + 3).map(|row| format!("row {row}")).collect();
        let values = expected.iter().map(|row| row.as_str().into()).collect();
        let file = parquet::<ByteArrayType>("required binary text (UTF8)", &[(values, None)]);
        assert_eq!(parquet_rows(file, "x").unwrap(), expected);
    }

    #[test]
    fn a_parquet_file_that_does_not_fit_is_named() {
        let other = parquet::<ByteArrayType>("required binary title (UTF8)", &[(strings(&["a"]), None)]);
        assert_eq!(message(parquet_rows(other, "x.parquet")), "x.parquet: no column `text`, got title");
        let number = parquet::<Int32Type>("required int32 text", &[(vec![7], None)]);
        assert!(message(parquet_rows(number, "x.parquet")).ends_with("got INT32"));
        let latin1 = vec![ByteArray::from("a"), ByteArray::from(vec![0xe9])];
        let latin1 = parquet::<ByteArrayType>("required binary text", &[(latin1, None)]);
        assert!(message(parquet_rows(latin1, "x.parquet")).contains("row 2"));
        for bytes in [&b""[..], b"PAR1", b"not a parquet file at all"] {
            assert!(message(parquet_rows(Bytes::from_static(bytes), "x.parquet")).starts_with("x.parquet: "));
        }
    }

    #[test]
    fn a_truncated_parquet_file_is_an_error() {
        let file = parquet::<ByteArrayType>("required binary text (UTF8)", &[(strings(&["a", "b"]), None)]);
        for length in 0..file.len() {
            assert!(parquet_rows(file.slice(..length), "x").is_err(), "{length} of {} bytes", file.len());
        }
    }

    #[test]
    fn json_lines_name_the_line_at_fault() {
        let good = "{\"text\": \"a\\n\"}\n\n{\"id\": 1, \"text\": \"b\"}\n";
        assert_eq!(json_lines_rows(good, "x").unwrap(), ["a\n", "b"]);
        for (line, expected) in [
            ("{\"text\": ", "x:4: not JSON"),
            ("{\"title\": \"a\"}", "x:4: no field"),
            ("{\"text\": null}", "x:4: the field"),
            ("[\"text\"]", "x:4: expected an object"),
        ] {
            let error = message(json_lines_rows(&format!("{good}{line}"), "x"));
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_text_file_is_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        for text in ["one\n\ntwo\r\n three", "\n", "no line end"] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_file(&path).unwrap().concat(), text);
        }
        fs::write(&path, [0xff]).unwrap();
        assert!(message(read_file(&path)).contains("a.txt"));
    }

    #[test]
    fn a_damaged_parquet_file_does_not_end_the_program() {
        let groups = [(strings(&["a", "b"]), Some(vec![1, 0, 1]))];
        let file = parquet::<ByteArrayType>("optional binary text (UTF8)", &groups);
        let mut errors = 0;
        for (byte, bit) in (0..file.len()).flat_map(|byte| (0..8).map(move |bit| (byte, bit))) {
            let mut damaged = file.to_vec();
            damaged[byte] ^= 1 << bit;
            // Some bits are not used; none may panic.
            errors += usize::from(parquet_rows(Bytes::from(damaged), "x").is_err());
        }
        assert!(errors > file.len(), "{errors} errors");
    }
}
