//! What is done to a generated answer before it is compared.

use crate::python;
use crate::request::Compat;

/// The harness's filter `remove_whitespace`: since 0.4.9.2 both ends, before only the left.
pub(crate) fn stripped(text: &str, compat: Compat) -> &str {
    match compat {
        Compat::Current => python::strip(text),
        Compat::NoBos => python::strip_start(text),
    }
}

/// Lower case without ASCII punctuation (Python's `string.punctuation`), as `exact_match`
/// compares with `ignore_case` and `ignore_punctuation`.
pub(crate) fn for_match(text: &str) -> String {
    text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect()
}
