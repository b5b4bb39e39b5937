//! Parquet files: a column of strings, or columns that together make a conversation.

use std::fmt::Display;
use std::sync::Arc;

use gptq_input::guard::quietly;
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{ChunkReader, FileReader};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::{Field as Cell, Row};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::{Map, Value};

use super::super::fields::Field;
use super::super::open::{MOST_ROW_BYTES, most_bytes, row_too_large, too_much};
use super::{ObjectRows, Piece, Reading, Visit};
use crate::error::{Error, Result};

/// Rows decoded at a time: it bounds the buffers, whatever row count a file claims.
const BATCH: usize = 4096;

/// The rows of a parquet file; nulls in a column of strings are empty rows. `at` names the file in errors.
pub(in super::super) fn visit_parquet<R: ChunkReader + 'static>(
    source: R,
    at: &str,
    reading: &Reading,
    visit: &mut Visit,
) -> Result<()> {
    let size = source.len();
    let mut left = most_bytes(size);
    let mut within = |piece: Piece| {
        if piece.text.len() > MOST_ROW_BYTES {
            return Err(Error::malformed(at, row_too_large()));
        }
        // An empty row is a row.
        left = left
            .checked_sub(piece.text.len() as u64 + 1)
            .ok_or_else(|| Error::malformed(at, too_much(size)))?;
        visit(piece)
    };
    // The parquet crate (60.1) checks most of a file, but panics on some damaged headers.
    quietly(|| decode(source, at, reading, &mut within))
        .unwrap_or_else(|problem| Err(Error::malformed(at, format!("damaged parquet file ({problem})"))))
}

fn decode<R: ChunkReader + 'static>(source: R, at: &str, reading: &Reading, visit: &mut Visit) -> Result<()> {
    let reader = SerializedFileReader::new(source).map_err(|cause| Error::malformed(at, cause))?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<(String, bool)> = schema
        .root_schema()
        .get_fields()
        .iter()
        .map(|field| (field.name().to_owned(), is_list(field)))
        .collect();
    let field = Field::choose(&names, reading.text_field).map_err(|problem| Error::malformed(at, problem))?;
    match field {
        Field::Text(name) => strings(&reader, &name, at, visit),
        field => objects(&reader, field, at, reading, visit),
    }
}

fn is_list(field: &Type) -> bool {
    field.is_group()
        || (field.get_basic_info().has_repetition()
            && field.get_basic_info().repetition() == parquet::basic::Repetition::REPEATED)
}

/// A column of strings, in batches.
fn strings(reader: &dyn FileReader, name: &str, at: &str, visit: &mut Visit) -> Result<()> {
    let malformed = |problem: &dyn Display| Error::malformed(at, problem);
    let mut column = text_column(reader.metadata().file_metadata().schema_descr(), name, at)?;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(|cause| malformed(&cause))?;
        match group.get_column_reader(column.index).map_err(|cause| malformed(&cause))? {
            ColumnReader::ByteArrayColumnReader(values) => column.read(values, visit)?,
            _ => return Err(malformed(&format!("the column `{name}` changes its type"))),
        }
    }
    Ok(())
}

struct TextColumn<'a> {
    index: usize,
    name: &'a str,
    at: &'a str,
    /// The definition level of a value that is there; a lower level is a null.
    present: i16,
    /// Rows read so far.
    rows: usize,
}

fn text_column<'a>(schema: &SchemaDescriptor, name: &'a str, at: &'a str) -> Result<TextColumn<'a>> {
    let expected = |got: &dyn Display| {
        Error::malformed(at, format!("expected one string a row in the column `{name}`, got {got}"))
    };
    let index = schema.columns().iter().position(|column| column.path().parts() == [name]);
    let index = index.ok_or_else(|| expected(&"none"))?;
    let column = schema.column(index);
    if column.physical_type() != PhysicalType::BYTE_ARRAY || column.max_rep_level() != 0 {
        return Err(expected(&column.physical_type()));
    }
    Ok(TextColumn { index, name, at, present: column.max_def_level(), rows: 0 })
}

impl TextColumn<'_> {
    /// Visits one row group's rows.
    fn read(&mut self, mut reader: ColumnReaderImpl<ByteArrayType>, visit: &mut Visit) -> Result<()> {
        loop {
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let read = reader.read_records(BATCH, Some(&mut levels), None, &mut values);
            let (records, ..) = read.map_err(|cause| Error::malformed(self.at, cause))?;
            if records == 0 {
                return Ok(());
            }
            // A column that cannot be null has no levels.
            levels.resize(records, self.present);
            let mut values = values.into_iter();
            for level in levels {
                self.rows += 1;
                let value = if level == self.present { values.next() } else { Some(ByteArray::from("")) };
                let text = value.as_ref().and_then(|value| value.as_utf8().ok());
                let text = text.ok_or_else(|| {
                    let problem =
                        format!("row {} of the column `{}` is not UTF-8 text", self.rows, self.name);
                    Error::malformed(self.at, problem)
                })?;
                visit(Piece::row(text))?;
            }
        }
    }
}

/// Rows of several columns or of nested ones, as JSON objects.
fn objects(
    reader: &dyn FileReader,
    field: Field,
    at: &str,
    reading: &Reading,
    visit: &mut Visit,
) -> Result<()> {
    let schema = reader.metadata().file_metadata().schema_descr().root_schema();
    let wanted = field.names();
    let columns: Vec<Arc<Type>> =
        schema.get_fields().iter().filter(|column| wanted.contains(&column.name())).cloned().collect();
    let malformed = |cause: parquet::errors::ParquetError| Error::malformed(at, cause);
    let projection =
        Type::group_type_builder(schema.name()).with_fields(columns).build().map_err(malformed)?;
    let mut rows = ObjectRows { field: Some(field), ..ObjectRows::new(reading, visit) };
    for (index, row) in reader.get_row_iter(Some(projection)).map_err(malformed)?.enumerate() {
        let row = Value::Object(object(&row.map_err(malformed)?));
        rows.push(row, &|| format!("{at}, row {}", index + 1))?;
    }
    Ok(())
}

fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, cell)| (name.clone(), json(cell))).collect()
}

/// What messages are made of; other cells are null.
fn json(cell: &Cell) -> Value {
    match cell {
        Cell::Bool(value) => (*value).into(),
        Cell::Int(value) => (*value).into(),
        Cell::Long(value) => (*value).into(),
        Cell::Double(value) => (*value).into(),
        Cell::Str(text) => text.as_str().into(),
        Cell::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Value::from),
        Cell::Group(row) => Value::Object(object(row)),
        Cell::ListInternal(list) => list.elements().iter().map(json).collect(),
        _ => Value::Null,
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

    use super::super::testing::collect;
    use super::*;

    fn parquet_rows(source: Bytes, at: &str) -> Result<Vec<String>> {
        collect(None, |reading, visit| visit_parquet(source, at, reading, visit))
    }

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
        assert_eq!(
            message(parquet_rows(other, "x.parquet")),
            "x.parquet: no field `text`; the fields are title: choose one with --text-field"
        );
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
    fn a_column_may_be_chosen() {
        let file = parquet::<ByteArrayType>("required binary body (UTF8)", &[(strings(&["a", "b"]), None)]);
        let rows = collect(Some("body"), |reading, visit| visit_parquet(file, "x", reading, visit));
        assert_eq!(rows.unwrap(), ["a", "b"]);
    }

    #[test]
    fn conversations_are_lists_of_structs() {
        let schema =
            "message schema { optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut file = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
        let mut group = file.next_row_group().unwrap();
        // Two conversations, of two messages and of one.
        for values in [["user", "assistant", "user"], ["Hi", "Hello", "Ho"]] {
            let mut writer = group.next_column().unwrap().unwrap();
            let (values, levels) = (strings(&values), [4, 4, 4]);
            writer.typed::<ByteArrayType>().write_batch(&values, Some(&levels), Some(&[0, 1, 0])).unwrap();
            writer.close().unwrap();
        }
        group.close().unwrap();
        assert_eq!(parquet_rows(file.into_inner().unwrap().into(), "x").unwrap(), ["<Hi>", "<Ho>"]);
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
