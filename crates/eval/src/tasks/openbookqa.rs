//! OpenBookQA: sentences of elementary science with four ends.

use relufy_data::Record;

use super::fields::{Malformed, text};
use super::{Document, Shots, Source, Task, arc};
use crate::metrics::Metric;
use crate::python;

/// `openbookqa`, on the test split, without the book.
pub struct OpenBookQa;

impl Task for OpenBookQa {
    fn name(&self) -> &str {
        "openbookqa"
    }

    fn source(&self) -> Source {
        Source::Split { repo: "allenai/openbookqa", config: "main", split: "test" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: false }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let (answers, gold) = arc::choices(record, python::strip_start)?;
        Ok(Document::choice(text(record, "question_stem")?.to_owned(), &answers, gold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stem_alone_is_the_context() {
        let record = serde_json::from_str(
            r#"{"question_stem": "The sun", "answerKey": " B",
                "choices": {"text": ["sinks", "shines"], "label": ["A", "B"]}}"#,
        );
        let expected = Document::choice("The sun".into(), &["sinks", "shines"], 1);
        assert_eq!(OpenBookQa.document(&record.unwrap()), Ok(expected));
    }
}
