//! `--set key=value`: an edit of the TOML text before it is parsed, so that a mistyped key
//! fails like one in the file.

use toml_edit::{DocumentMut, Item, Table, Value};

use crate::{Error, Result};

/// The text with the edits applied; unchanged, byte for byte, where there are none.
pub(super) fn apply(text: &str, origin: &str, set: &[String]) -> Result<String> {
    if set.is_empty() {
        return Ok(text.to_string());
    }
    let mut document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| {
        Error::Config { origin: origin.to_string(), message: error.to_string().trim_end().into() }
    })?;
    for argument in set {
        let refuse = |why: String| Error::Set { argument: argument.clone(), why };
        let (path, value) =
            argument.split_once('=').ok_or_else(|| refuse("expected key=value".to_string()))?;
        let keys: Vec<&str> = path.trim().split('.').map(str::trim).collect();
        if keys.iter().any(|key| key.is_empty()) {
            return Err(refuse(format!("`{path}` is no key")));
        }
        assign(document.as_item_mut(), &keys, parse_value(value.trim())).map_err(refuse)?;
    }
    Ok(document.to_string())
}

/// A TOML value; text that is none (`runs/a`, `cosine`) is taken as a string.
fn parse_value(text: &str) -> Value {
    text.parse::<Value>().unwrap_or_else(|_| Value::from(text))
}

/// Walks down `keys`, making tables on the way, and puts `value` at the end.
fn assign(item: &mut Item, keys: &[&str], value: Value) -> std::result::Result<(), String> {
    let [key, rest @ ..] = keys else { return Ok(()) };
    if item.is_none() {
        *item = Item::Table(Table::new());
    }
    if let Some(tables) = item.as_array_of_tables_mut() {
        let count = tables.len();
        let table = key.parse().ok().and_then(|index: usize| tables.get_mut(index));
        let table = table.ok_or_else(|| format!("`{key}` is no index into {count} tables"))?;
        let Some((next, rest)) = rest.split_first() else {
            return Err(format!("`{key}` is a whole table; name a key in it"));
        };
        return place(table.entry(next).or_insert(Item::None), rest, value);
    }
    match item.as_table_like_mut() {
        Some(table) => place(table.entry(key).or_insert(Item::None), rest, value),
        None => Err(format!("`{key}` stands under a value that is no table")),
    }
}

/// Puts the value here, or goes on down.
fn place(item: &mut Item, rest: &[&str], value: Value) -> std::result::Result<(), String> {
    if !rest.is_empty() {
        return assign(item, rest, value);
    }
    *item = Item::Value(value);
    Ok(())
}
