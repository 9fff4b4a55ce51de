//! TriviaQA without documents: the answer is generated and must be one of the aliases.

use relufy_data::Record;

use super::fields::{Malformed, object, text, texts};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;

/// What ends an answer.
const UNTIL: [&str; 3] = ["\n", ".", ","];
/// The harness's default for tasks that do not say.
const MAX_TOKENS: usize = 256;

/// `triviaqa`, on the validation split.
pub struct TriviaQa;

impl Task for TriviaQa {
    fn name(&self) -> &str {
        "triviaqa"
    }

    fn version(&self) -> f64 {
        3.0
    }

    fn source(&self) -> Source {
        Source::Split { repo: "mandarjoshi/trivia_qa", config: "rc.nocontext", split: "validation" }
    }

    fn shots(&self) -> Shots {
        Shots::Drawn { split: "train", apart: true }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::ExactMatch]
    }

    fn filter(&self) -> &'static str {
        "remove_whitespace"
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let aliases = texts(object(record, "answer")?, "aliases")?;
        if aliases.is_empty() {
            return Err(Malformed("field `answer.aliases`: expected an answer, found none".into()));
        }
        let aliases = aliases.into_iter().map(str::to_owned).collect();
        // Most questions end in a question mark of their own: two are the harness's.
        let context = format!("Question: {}?\nAnswer:", text(record, "question")?);
        Ok(Document::spoken(context, &UNTIL, MAX_TOKENS, aliases))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_right_and_value_is_not() {
        let json = r#"{"question": "Who?", "answer": {"value": "c", "aliases": ["a", "b"]}}"#;
        let expected = Document::spoken(
            "Question: Who??\nAnswer:".into(),
            &["\n", ".", ","],
            256,
            vec!["a".into(), "b".into()],
        );
        assert_eq!(TriviaQa.document(&serde_json::from_str(json).unwrap()), Ok(expected));
        let none = r#"{"question": "Who?", "answer": {"aliases": []}}"#;
        let why = TriviaQa.document(&serde_json::from_str(none).unwrap()).unwrap_err();
        assert!(why.0.contains("found none"), "{why}");
    }
}
