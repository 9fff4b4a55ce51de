//! HellaSwag: how a scene goes on.

use relufy_data::Record;

use super::fields::{Malformed, index, text, texts};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;
use crate::python;

/// `hellaswag`, on the validation split.
pub struct HellaSwag;

impl Task for HellaSwag {
    fn name(&self) -> &str {
        "hellaswag"
    }

    fn source(&self) -> Source {
        Source::Split { repo: "Rowan/hellaswag", config: "default", split: "validation" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: true }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    /// Adds `query`, `choices` and `gold`.
    fn process(&self, mut record: Record) -> Result<Record, Malformed> {
        let activity = text(&record, "activity_label")?;
        let begun = python::capitalize(text(&record, "ctx_b")?);
        let query = cleaned(&format!("{activity}: {} {begun}", text(&record, "ctx_a")?));
        let choices: Vec<String> =
            texts(&record, "endings")?.iter().map(|ending| cleaned(ending)).collect();
        let gold = index(&record, "label", choices.len())?;
        record.insert("query".into(), query.into());
        record.insert("choices".into(), choices.into());
        record.insert("gold".into(), gold.into());
        Ok(record)
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let choices = texts(record, "choices")?;
        let gold = index(record, "gold", choices.len())?;
        Ok(Document::choice(text(record, "query")?.to_owned(), &choices, gold))
    }
}

/// Text without the marks that WikiHow's articles left in it. Two blanks become one once:
/// of four, two stay.
fn cleaned(text: &str) -> String {
    without_brackets(&python::strip(text).replace(" [title]", ". ")).replace("  ", " ")
}

/// Drops each `[` with all up to the next `]`, where they stand on one line.
fn without_brackets(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        let inner = &rest[open + 1..];
        match inner.find(['\n', ']']) {
            Some(end) if inner[end..].starts_with(']') => {
                kept.push_str(&rest[..open]);
                rest = &inner[end + 1..];
            }
            _ => {
                kept.push_str(&rest[..=open]);
                rest = inner;
            }
        }
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processed(json: &str) -> Result<Record, Malformed> {
        HellaSwag.process(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_record_gains_what_is_asked() {
        let record = processed(
            r#"{"activity_label": "Roof", "ctx_a": "A man [substeps] sits.", "ctx_b": "THE man",
                "endings": [" [title] a", "b  c "], "label": "1"}"#,
        )
        .unwrap();
        let keys: Vec<&str> = record.keys().map(String::as_str).collect();
        assert_eq!(keys[5..], ["query", "choices", "gold"]);
        let query = "Roof: A man sits. The man".to_owned();
        assert_eq!(record["query"], query);
        assert_eq!(HellaSwag.document(&record), Ok(Document::choice(query, &[" a", "b c"], 1)));
    }

    #[test]
    fn cleaning_is_the_harness_s() {
        for (text, clean) in [
            // Stripped first: a title at the very beginning has lost its blank.
            (" [title] How", " How"),
            ("Shave: [title] How to", "Shave:. How to"),
            ("a [step] b [x] c", "a b c"),
            // Two by two, once.
            ("a    b", "a  b"),
            ("a   b", "a  b"),
            ("[a [b] c]", " c]"),
            ("[ a\n] [b]", "[ a\n] "),
            ("[", "["),
        ] {
            assert_eq!(cleaned(text), clean, "{text:?}");
        }
    }

    #[test]
    fn an_unlabelled_record_is_refused() {
        let why = processed(
            r#"{"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": ""}"#,
        );
        assert!(why.unwrap_err().0.contains("`label`: expected an index below 1, found \"\""));
    }
}
