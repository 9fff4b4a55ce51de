//! Records from parquet, row by row, through the reader that needs no Arrow.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::{Opened, record_error};
use crate::{Error, Result};

/// The rows of a file as JSON objects, each with its number from 1.
pub(crate) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    number: u64,
}

impl ParquetRows {
    /// Reads the named columns (those of them that exist), or all.
    pub(crate) fn open(opened: Opened, columns: Option<&[&str]>) -> Result<Self> {
        let Opened { path, mut reader, compressed } = opened;
        let file = if compressed {
            // The index stands at the end, so a stream will not do.
            let mut plain = tempfile::tempfile().map_err(|e| Error::io(std::env::temp_dir(), e))?;
            std::io::copy(&mut reader, &mut plain).map_err(|e| Error::bad_file(&path, e))?;
            plain
        } else {
            drop(reader);
            File::open(&path).map_err(|e| Error::io(&path, e))?
        };
        let bad = |e: parquet::errors::ParquetError| Error::bad_file(&path, e);
        let reader = SerializedFileReader::new(file).map_err(bad)?;
        let schema = reader.metadata().file_metadata().schema().clone();
        let projection = match columns {
            Some(columns) => {
                let wanted = |field: &&Arc<Type>| columns.contains(&field.name());
                let fields: Vec<_> = schema.get_fields().iter().filter(wanted).cloned().collect();
                if fields.is_empty() {
                    let names: Vec<_> = schema.get_fields().iter().map(|f| f.name()).collect();
                    return Err(Error::bad_file(
                        &path,
                        format!(
                            "has no column {}: its columns are {}",
                            columns.join(" or "),
                            names.join(", ")
                        ),
                    ));
                }
                let group = Type::group_type_builder(schema.name()).with_fields(fields);
                Some(group.build().map_err(bad)?)
            }
            None => None,
        };
        let rows = RowIter::from_file_into(Box::new(reader)).project(projection).map_err(bad)?;
        Ok(ParquetRows { path, rows, number: 0 })
    }
}

impl Iterator for ParquetRows {
    type Item = Result<(u64, Map<String, Value>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.rows.next()?;
        self.number += 1;
        Some(match row {
            Ok(row) => Ok((self.number, object(&row))),
            Err(error) => Err(record_error(&self.path, "row", self.number, error)),
        })
    }
}

fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

/// A field as the JSON that the datasets library would write for it.
fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => Value::Bool(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float16(v) => float(f64::from(v.to_f32())),
        Field::Float(v) => float(f64::from(*v)),
        Field::Double(v) => float(*v),
        Field::Str(v) => Value::String(v.clone()),
        Field::Bytes(v) => match std::str::from_utf8(v.data()) {
            // Old writers leave the string annotation out.
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Array(v.data().iter().map(|b| Value::from(*b)).collect()),
        },
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => {
            let entry = |(key, item): &(Field, Field)| {
                let key = match value(key) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, value(item))
            };
            Value::Object(map.entries().iter().map(entry).collect())
        }
        // Dates, times and decimals: their written form.
        other => Value::String(other.to_string()),
    }
}

/// JSON has no number for what is not finite.
fn float(v: f64) -> Value {
    Number::from_f64(v).map_or(Value::Null, Value::Number)
}
