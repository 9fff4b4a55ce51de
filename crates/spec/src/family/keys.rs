//! Reads a JSON object so that every key is consumed once and none is overlooked.
//!
//! A key that nobody reads is an error at the end: a forgotten `rope_scaling` would be a
//! silently wrong model. A key whose value is `null` counts as absent.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::{Error, Result, validate::MAX_SIZE};

/// The keys of an object that are still to be read.
pub(super) struct Keys<'a> {
    /// What stands before a key's name in errors: empty, or `rope_scaling.`.
    path: &'static str,
    left: BTreeMap<&'a str, &'a Value>,
    nulls: BTreeSet<&'a str>,
}

/// A type that a key's value can have.
pub(super) trait Read: Sized + PartialEq {
    /// The type's name in errors.
    const EXPECTED: &'static str;
    /// The value, if it is of that type.
    fn read(value: &Value) -> Option<Self>;
}

impl Read for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Value) -> Option<bool> {
        value.as_bool()
    }
}

impl Read for usize {
    const EXPECTED: &'static str = "a whole number, not negative";
    fn read(value: &Value) -> Option<usize> {
        value.as_u64().and_then(|number| usize::try_from(number).ok())
    }
}

impl Read for f64 {
    const EXPECTED: &'static str = "a number";
    fn read(value: &Value) -> Option<f64> {
        value.as_f64().filter(|number| number.is_finite())
    }
}

impl Read for String {
    const EXPECTED: &'static str = "a string";
    fn read(value: &Value) -> Option<String> {
        value.as_str().map(str::to_owned)
    }
}

impl Read for Vec<String> {
    const EXPECTED: &'static str = "a list of strings";
    fn read(value: &Value) -> Option<Vec<String>> {
        value.as_array()?.iter().map(String::read).collect()
    }
}

impl<'a> Keys<'a> {
    /// All keys of `map`. `path` stands before their names in errors.
    pub fn new(map: &'a Map<String, Value>, path: &'static str) -> Keys<'a> {
        let mut keys = Keys { path, left: BTreeMap::new(), nulls: BTreeSet::new() };
        for (key, value) in map {
            if value.is_null() {
                keys.nulls.insert(key);
            } else {
                keys.left.insert(key, value);
            }
        }
        keys
    }

    /// Whether the key is there with the value `null`. Only for keys whose absence means
    /// something else (Mistral's `sliding_window`).
    pub fn is_null(&self, key: &str) -> bool {
        self.nulls.contains(key)
    }

    /// A key's value, without consuming it.
    pub fn peek(&self, key: &str) -> Option<&'a Value> {
        self.left.get(key).copied()
    }

    /// Consumes a key, whatever its value.
    pub fn take(&mut self, key: &str) -> Option<&'a Value> {
        self.left.remove(key)
    }

    /// Consumes a key that may be absent.
    pub fn optional<T: Read>(&mut self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match T::read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.bad(key, T::EXPECTED, value)),
        }
    }

    /// Consumes a key, or gives `default` (that of transformers' config class).
    pub fn or<T: Read>(&mut self, key: &str, default: T) -> Result<T> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// Consumes a key that must be there.
    pub fn required<T: Read>(&mut self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| Error::MissingKey { key: format!("{}{key}", self.path) })
    }

    /// Consumes all spellings of one setting; those that are there must agree.
    pub fn alias<T: Read>(&mut self, names: &[&str]) -> Result<Option<T>> {
        let mut found: Option<(&str, &Value, T)> = None;
        for name in names {
            let Some(value) = self.peek(name) else { continue };
            let Some(read) = self.optional::<T>(name)? else { continue };
            match &found {
                Some((first, stands, earlier)) if *earlier != read => {
                    return Err(self.bad(name, &format!("the {stands} of `{first}`"), value));
                }
                Some(_) => {}
                None => found = Some((name, value, read)),
            }
        }
        Ok(found.map(|(_, _, read)| read))
    }

    /// Consumes a size under any of its names: at least 1, at most [`MAX_SIZE`].
    pub fn optional_size(&mut self, names: &[&str]) -> Result<Option<usize>> {
        let shown = names.iter().find_map(|name| Some((*name, self.peek(name)?)));
        match (self.alias::<usize>(names)?, shown) {
            (Some(size), Some((name, value))) if size == 0 || size > MAX_SIZE => {
                Err(self.bad(name, &format!("1 to {MAX_SIZE}"), value))
            }
            (size, _) => Ok(size),
        }
    }

    /// Consumes a size, or gives `default`.
    pub fn size_or(&mut self, names: &[&str], default: usize) -> Result<usize> {
        Ok(self.optional_size(names)?.unwrap_or(default))
    }

    /// Consumes keys that say nothing about the decoder, whatever their values.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.take(name);
        }
    }

    /// Consumes keys that must be numbers, and ignores them (dropout rates and the like:
    /// nothing is dropped here).
    pub fn ignore_numbers(&mut self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.optional::<f64>(name).map(|_| ()))
    }

    /// Consumes a key that may only say `allowed`, since anything else would change the
    /// model in a way that is not implemented.
    pub fn only<T: Read + std::fmt::Display>(&mut self, key: &str, allowed: T) -> Result<()> {
        let value = self.peek(key);
        match (self.optional::<T>(key)?, value) {
            (Some(found), Some(value)) if found != allowed => {
                Err(self.bad(key, &allowed.to_string(), value))
            }
            _ => Ok(()),
        }
    }

    /// A value of this object that cannot be.
    pub fn bad(&self, key: &str, expected: &str, found: impl std::fmt::Display) -> Error {
        Error::BadValue {
            key: format!("{}{key}", self.path),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }

    /// Nothing may be left.
    pub fn finish(self) -> Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        Err(Error::UnknownKeys {
            keys: self.left.keys().map(|key| format!("{}{key}", self.path)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_key_is_consumed_once_and_leftovers_are_named() {
        let map = map(json!({"a": 1, "b": 2.5, "c": "x", "n": null}));
        let mut keys = Keys::new(&map, "outer.");
        assert_eq!(keys.required::<usize>("a").unwrap(), 1);
        assert_eq!(keys.optional::<usize>("a").unwrap(), None);
        assert!(keys.is_null("n") && !keys.is_null("a"));
        assert_eq!(
            keys.finish(),
            Err(Error::UnknownKeys { keys: vec!["outer.b".into(), "outer.c".into()] })
        );
    }

    #[test]
    fn wrong_types_say_what_stands_there() {
        let map = map(json!({"a": -1, "b": "yes", "zero": 0, "huge": 18446744073709551615u64}));
        let mut keys = Keys::new(&map, "");
        for (error, key, found) in [
            (keys.optional::<usize>("a").unwrap_err(), "a", "-1"),
            (keys.optional::<bool>("b").unwrap_err(), "b", "\"yes\""),
            (keys.optional_size(&["zero"]).unwrap_err(), "zero", "0"),
            (keys.optional_size(&["huge"]).unwrap_err(), "huge", "18446744073709551615"),
        ] {
            assert!(
                matches!(&error, Error::BadValue { key: k, found: f, .. } if k == key && f == found),
                "{error}"
            );
        }
        assert_eq!(
            keys.required::<String>("absent"),
            Err(Error::MissingKey { key: "absent".into() })
        );
    }

    #[test]
    fn spellings_of_one_setting_must_agree() {
        let same = map(json!({"new": 3, "old": 3}));
        assert_eq!(Keys::new(&same, "").alias::<usize>(&["new", "old"]).unwrap(), Some(3));
        let other = map(json!({"new": 3, "old": 4}));
        let error = Keys::new(&other, "").alias::<usize>(&["new", "old"]).unwrap_err();
        assert_eq!(error.to_string(), "config key `old`: expected the 3 of `new`, found 4");
    }
}
