//! PIQA: which of two ways reaches an everyday goal.

use relufy_data::Record;

use super::fields::{Malformed, index, text};
use super::{Document, Source, Task};
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

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let context = format!("Question: {}\nAnswer:", text(record, "goal")?);
        let choices = [text(record, "sol1")?, text(record, "sol2")?];
        Ok(Document::choice(context, &choices, index(record, "label", choices.len())?))
    }
}
