//! Reading a record's fields, with errors that name the field.

use relufy_data::Record;
use serde_json::Value;

/// What is wrong with a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

/// Result of reading a field.
pub(super) type Result<T> = std::result::Result<T, Malformed>;

/// The text of field `name`.
pub(super) fn text<'a>(record: &'a Record, name: &str) -> Result<&'a str> {
    field(record, name)?.as_str().ok_or_else(|| wrong(name, "a string", &record[name]))
}

/// The texts of list `name`.
pub(super) fn texts<'a>(record: &'a Record, name: &str) -> Result<Vec<&'a str>> {
    let value = field(record, name)?;
    value
        .as_array()
        .and_then(|items| items.iter().map(Value::as_str).collect())
        .ok_or_else(|| wrong(name, "a list of strings", value))
}

/// The object in field `name`.
pub(super) fn object<'a>(record: &'a Record, name: &str) -> Result<&'a Record> {
    field(record, name)?.as_object().ok_or_else(|| wrong(name, "an object", &record[name]))
}

/// The index in field `name` (a number, or a string of one), below `choices`.
pub(super) fn index(record: &Record, name: &str, choices: usize) -> Result<usize> {
    let value = field(record, name)?;
    let number = value.as_u64().or_else(|| value.as_str()?.trim().parse().ok());
    number
        .and_then(|number| usize::try_from(number).ok())
        .filter(|index| *index < choices)
        .ok_or_else(|| wrong(name, &format!("an index below {choices}"), value))
}

fn field<'a>(record: &'a Record, name: &str) -> Result<&'a Value> {
    record.get(name).ok_or_else(|| {
        let there: Vec<&str> = record.keys().map(String::as_str).collect();
        Malformed(format!("field `{name}` is missing (fields: {})", there.join(", ")))
    })
}

fn wrong(name: &str, expected: &str, found: &Value) -> Malformed {
    let mut found = found.to_string();
    if let Some((cut, _)) = found.char_indices().nth(60) {
        found.truncate(cut);
        found.push_str("...");
    }
    Malformed(format!("field `{name}`: expected {expected}, found {found}"))
}
