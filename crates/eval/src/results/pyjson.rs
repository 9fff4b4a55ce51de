//! JSON and texts as Python writes them, since lm-evaluation-harness hashes what it writes:
//! floats in Python's notation, `", "` and `": "` between parts, `str()` of lists.

use std::io::{self, Write};
use std::sync::OnceLock;

use regex::Regex;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use sha2::{Digest, Sha256};

use crate::Result;

/// Python's `repr` of a float: the shortest digits that bring it back, with an exponent
/// below 1e-4 and from 1e16 on.
pub(crate) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    if value != 0.0 && !(1e-4..1e16).contains(&value.abs()) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = value.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// `json.dumps(value, indent=2, ensure_ascii=False)`.
pub(crate) fn indented(value: &impl Serialize) -> Result<String> {
    written(value, Python(PrettyFormatter::new()))
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(crate) fn line(value: &impl Serialize) -> Result<String> {
    written(value, Python(OneLine))
}

fn written<F: Formatter>(value: &impl Serialize, form: Python<F>) -> Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, form))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Python's `str` of what JSON can hold.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => repr(other),
    }
}

/// Lower-case hexadecimal SHA-256 of a text's UTF-8 bytes.
pub(crate) fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => match (number.is_f64(), number.as_f64()) {
            (true, Some(value)) => float(value),
            _ => number.to_string(),
        },
        Value::String(text) => quoted(text),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", "))
        }
        Value::Object(fields) => {
            let field =
                |(key, value): (&String, &Value)| format!("{}: {}", quoted(key), repr(value));
            format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(", "))
        }
    }
}

/// Python's `repr` of a text: in single quotes, unless only those occur in it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            '\\' => out += "\\\\",
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                out += &match code {
                    0..0x100 => format!("\\x{code:02x}"),
                    0x100..0x1_0000 => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
    out
}

/// Python's `str.isprintable` of a character: neither control nor separator, but the blank.
fn is_printable(c: char) -> bool {
    static OTHER: OnceLock<Option<Regex>> = OnceLock::new();
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let other = OTHER.get_or_init(|| Regex::new(r"^[\p{C}\p{Z}]").ok());
    !other.as_ref().is_some_and(|other| other.is_match(c.encode_utf8(&mut [0; 4])))
}

/// A layout, with floats as Python writes them.
struct Python<F>(F);

impl<F: Formatter> Formatter for Python<F> {
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_array(out)
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array(out)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array_value(out)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object(out)
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object_value(out)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object_value(out)
    }
}

/// All on one line, with blanks after commas and colons.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_pythons() {
        let given = [0.1, 1.0, -73.92758178710938, 1e-5, 1.5e-7, 1e16, 1e15, -0.0, 0.0001, 1e300];
        // [repr(x) for x in ...], CPython 3.11
        let expected =
            "0.1 1.0 -73.92758178710938 1e-05 1.5e-07 1e+16 1000000000000000.0 -0.0 0.0001 1e+300";
        assert_eq!(given.map(float).join(" "), expected);
    }

    #[test]
    fn json_is_pythons() {
        let value = json!({"a": [1, 2.0, "é\u{1}\u{7f}\"\\/"], "b": {}, "c": [], "d": null});
        // json.dumps of the same, CPython 3.11
        assert_eq!(
            line(&value).unwrap(),
            "{\"a\": [1, 2.0, \"é\\u0001\u{7f}\\\"\\\\/\"], \"b\": {}, \"c\": [], \"d\": null}"
        );
        assert_eq!(
            indented(&value).unwrap(),
            "{\n  \"a\": [\n    1,\n    2.0,\n    \"é\\u0001\u{7f}\\\"\\\\/\"\n  ],\n  \"b\": {},\n  \"c\": [],\n  \"d\": null\n}"
        );
    }

    #[test]
    fn texts_are_pythons() {
        let list = json!(["a", "it's", "'\"", "\u{a0}\u{200b}é\u{e000}\u{1f600}\n\u{7f}", 3, true]);
        // str([...]), CPython 3.11
        let expected = r#"['a', "it's", '\'"', '\xa0\u200bé\ue000😀\n\x7f', 3, True]"#;
        assert_eq!(text(&list), expected);
        assert_eq!((text(&json!("a'b")), text(&json!(2))), ("a'b".into(), "2".into()));
        assert_eq!(sha256("0"), "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9");
    }
}
