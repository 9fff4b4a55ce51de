//! WinoGrande: whom a sentence speaks of. The two readings are contexts of the same end.

use relufy_data::Record;

use super::fields::{Malformed, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;
use crate::python;

/// `winogrande`, on the validation split.
pub struct WinoGrande;

impl Task for WinoGrande {
    fn name(&self) -> &str {
        "winogrande"
    }

    fn source(&self) -> Source {
        Source::Split { repo: "allenai/winogrande", config: "winogrande_xl", split: "validation" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: true }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let sentence = text(record, "sentence")?;
        let (before, after) = sentence.split_once('_').ok_or_else(|| {
            Malformed(format!("field `sentence`: no `_` to fill in \"{sentence}\""))
        })?;
        let readings = [text(record, "option1")?, text(record, "option2")?];
        let gold = match text(record, "answer")? {
            "1" => 0,
            "2" => 1,
            other => {
                let why = format!("field `answer`: expected \"1\" or \"2\", found \"{other}\"");
                return Err(Malformed(why));
            }
        };
        let contexts = readings.map(|option| format!("{before}{option}")).into();
        Ok(Document::contexts(contexts, python::strip(after), gold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(sentence: &str, answer: &str) -> Result<Document, Malformed> {
        let fields =
            [("sentence", sentence), ("option1", "A"), ("option2", "B"), ("answer", answer)];
        let record = fields.map(|(name, value)| (name.to_owned(), value.into()));
        WinoGrande.document(&record.into_iter().collect())
    }

    #[test]
    fn both_readings_are_followed_by_the_same_end() {
        let expected = Document::contexts(vec!["x A".into(), "x B".into()], "is _ here.", 1);
        assert_eq!(document("x _ is _ here. ", "2"), Ok(expected));
        assert!(document("x", "1").unwrap_err().0.contains("no `_`"));
        assert!(document("_", "").unwrap_err().0.contains("expected \"1\" or \"2\", found \"\""));
    }
}
