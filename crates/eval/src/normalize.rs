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

/// Whether `said` is one of `aliases` in lower case and without ASCII punctuation (Python's
/// `string.punctuation`): `exact_match` with `ignore_case` and `ignore_punctuation`.
pub(crate) fn matches_any(said: &str, aliases: &[String]) -> bool {
    let width = |text: &str| text.chars().count();
    let said = comparable(said, width(said));
    let widest = aliases.iter().map(|alias| width(alias)).max().unwrap_or_default();
    aliases.iter().any(|alias| comparable(alias, widest) == said)
}

/// The harness compares in NumPy's arrays of strings, whose width is set before they are
/// lowered (`İ` becomes two characters, and the last one falls off) and which end at their
/// last character that is not NUL.
fn comparable(text: &str, width: usize) -> String {
    let lower = text.to_lowercase();
    let kept: String = lower.chars().take(width).filter(|c| !c.is_ascii_punctuation()).collect();
    kept.trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_harness_compares() {
        // lm_eval.api.metrics.exact_match_hf_evaluate on NumPy 2.
        for (said, aliases, same) in [
            ("j.r.r. TOLKIEN", &["JRR Tolkien"][..], true),
            ("foo", &["Foo !"], false),
            ("foo ", &["Foo !"], true),
            ("", &["..."], true),
            ("“a”", &["a"], false),
            ("ΟΔΟΣ", &["οδος"], true),
            ("İa", &["i\u{307}a"], false),
            ("İa", &["i\u{307}"], true),
            ("i\u{307}a", &["İa"], false),
            ("i\u{307}a", &["İa", "wider"], true),
            ("a\0", &["a"], true),
        ] {
            let aliases: Vec<String> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
            assert_eq!(matches_any(said, &aliases), same, "{said:?} {aliases:?}");
        }
    }
}
