//! SciQ: science questions after a paragraph that supports the answer.

use relufy_data::Record;

use super::fields::{Malformed, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;
use crate::python;

/// `sciq`, on the test split.
pub struct SciQ;

impl Task for SciQ {
    fn name(&self) -> &str {
        "sciq"
    }

    fn source(&self) -> Source {
        Source::Split { repo: "allenai/sciq", config: "default", split: "test" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: false }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let support = python::strip_start(text(record, "support")?);
        let context = format!("{support}\nQuestion: {}\nAnswer:", text(record, "question")?);
        let fields = ["distractor1", "distractor2", "distractor3", "correct_answer"];
        let choices: Vec<&str> =
            fields.iter().map(|field| text(record, field)).collect::<Result<_, _>>()?;
        Ok(Document::choice(context, &choices, 3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_support_the_context_begins_with_a_line_break() {
        let record = serde_json::from_str(
            r#"{"question": "Q?", "support": " \n", "distractor3": "c", "distractor1": "a",
                "distractor2": "b", "correct_answer": "d"}"#,
        );
        let context = "\nQuestion: Q?\nAnswer:".to_owned();
        let expected = Document::choice(context, &["a", "b", "c", "d"], 3);
        assert_eq!(SciQ.document(&record.unwrap()), Ok(expected));
    }
}
