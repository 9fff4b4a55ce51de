//! ARC: science questions with three to five answers; also the schema for questions of
//! one's own.

use std::path::PathBuf;

use relufy_data::Record;

use super::fields::{Malformed, object, text, texts};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;

/// `arc_easy`, `arc_challenge`, or a file in their schema: `question`, `choices.text`,
/// `choices.label`, `answerKey` (one of the labels).
pub struct Arc {
    name: String,
    source: Source,
}

impl Arc {
    /// `arc_easy`, on the test split.
    pub fn easy() -> Arc {
        Arc::split("arc_easy", "ARC-Easy")
    }

    /// `arc_challenge`, on the test split.
    pub fn challenge() -> Arc {
        Arc::split("arc_challenge", "ARC-Challenge")
    }

    /// Questions of one's own, as a task called `name`.
    pub fn file(name: impl Into<String>, path: impl Into<PathBuf>) -> Arc {
        Arc { name: name.into(), source: Source::File(path.into()) }
    }

    fn split(name: &str, config: &'static str) -> Arc {
        let source = Source::Split { repo: "allenai/ai2_arc", config, split: "test" };
        Arc { name: name.into(), source }
    }
}

impl Task for Arc {
    fn name(&self) -> &str {
        &self.name
    }

    fn source(&self) -> Source {
        self.source.clone()
    }

    fn shots(&self) -> Shots {
        // A file of one's own has no other split than itself.
        let apart = matches!(self.source, Source::File(_));
        Shots::Drawn { split: "train", apart }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::AccNorm]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let context = format!("Question: {}\nAnswer:", text(record, "question")?);
        let (answers, gold) = choices(record, |key| key)?;
        Ok(Document::choice(context, &answers, gold))
    }
}

/// The texts in `choices` and which of them is right: the one whose label is `answerKey`,
/// after `clean` has been at it.
pub(super) fn choices(
    record: &Record,
    clean: fn(&str) -> &str,
) -> Result<(Vec<&str>, usize), Malformed> {
    let choices = object(record, "choices")?;
    let (answers, labels) = (texts(choices, "text")?, texts(choices, "label")?);
    if answers.len() != labels.len() {
        let (texts, labels) = (answers.len(), labels.len());
        return Err(Malformed(format!("field `choices`: {texts} texts but {labels} labels")));
    }
    let key = clean(text(record, "answerKey")?);
    let gold = labels.iter().position(|label| *label == key).ok_or_else(|| {
        Malformed(format!("field `answerKey`: `{key}` is none of {}", labels.join(", ")))
    })?;
    Ok((answers, gold))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(json: &str) -> Result<Document, Malformed> {
        Arc::easy().document(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn labels_may_be_numbers_in_text() {
        let got = document(
            r#"{"question": "Q?", "answerKey": "2", "choices": {"text": ["a", "b"], "label": ["1", "2"]}}"#,
        );
        assert_eq!(got, Ok(Document::choice("Question: Q?\nAnswer:".into(), &["a", "b"], 1)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let why = |json: &str| document(json).unwrap_err().0;
        assert!(why(r#"{"Question": "Q?"}"#).contains("`question` is missing"));
        let choices = r#""choices": {"text": ["a"], "label": ["A"]}"#;
        let stray = why(&format!(r#"{{"question": "Q", "answerKey": "B", {choices}}}"#));
        assert!(stray.contains("`B` is none of A"), "{stray}");
        assert!(why(r#"{"question": 3}"#).contains("expected a string, found 3"));
    }
}
