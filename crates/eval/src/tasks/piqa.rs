//! PIQA: which of two ways reaches an everyday goal.

use relufy_data::Record;

use super::fields::{Malformed, index, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;

/// `piqa`, on the validation split.
pub struct Piqa;

impl Task for Piqa {
    fn name(&self) -> &str {
        "piqa"
    }

    fn source(&self) -> Source {
        Source::Split { repo: "baber/piqa", config: "plain_text", split: "validation" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: true }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let context = format!("Question: {}\nAnswer:", text(record, "goal")?);
        let choices = [text(record, "sol1")?, text(record, "sol2")?];
        Ok(Document::choice(context, &choices, index(record, "label", choices.len())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_solutions_of_one_goal() {
        let record = serde_json::from_str(r#"{"goal": "G", "sol1": "a", "sol2": "b", "label": 1}"#);
        let expected = Document::choice("Question: G\nAnswer:".into(), &["a", "b"], 1);
        assert_eq!(Piqa.document(&record.unwrap()), Ok(expected));
    }
}
