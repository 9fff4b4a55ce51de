//! BoolQ: yes or no, after a passage.

use relufy_data::Record;

use super::fields::{Malformed, index, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;

/// `boolq`, on the validation split of SuperGLUE's.
pub struct BoolQ;

impl Task for BoolQ {
    fn name(&self) -> &str {
        "boolq"
    }

    fn version(&self) -> f64 {
        2.0
    }

    fn source(&self) -> Source {
        Source::Split { repo: "aps/super_glue", config: "boolq", split: "validation" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: true }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let (passage, question) = (text(record, "passage")?, text(record, "question")?);
        let choices = ["no", "yes"];
        let gold = index(record, "label", choices.len())?;
        Ok(Document::choice(format!("{passage}\nQuestion: {question}?\nAnswer:"), &choices, gold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_comes_first() {
        let record = serde_json::from_str(r#"{"passage": "P.", "question": "is it", "label": 1}"#);
        let expected = Document::choice("P.\nQuestion: is it?\nAnswer:".into(), &["no", "yes"], 1);
        assert_eq!(BoolQ.document(&record.unwrap()), Ok(expected));
        let unlabelled: Record =
            serde_json::from_str(r#"{"passage": "P.", "question": "is it", "label": -1}"#).unwrap();
        let why = BoolQ.document(&unlabelled).unwrap_err().0;
        assert!(why.contains("`label`: expected an index below 2, found -1"), "{why}");
    }
}
