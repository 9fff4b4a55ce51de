//! Tasks: what is asked of a model, and what counts as right.
//!
//! A task turns each record of a dataset into a [`Document`]; everything else (loading,
//! tokenising, scoring, metrics, exclusions) is the same for all. The shapes of documents
//! are in `document.rs`, so that a task is about one screen. Prompts, splits and metrics
//! are those of lm-evaluation-harness 0.4.13.

mod arc;
mod boolq;
mod catalog;
mod chosen;
mod document;
mod examples;
mod fields;
mod group;
mod hellaswag;
mod lambada;
mod mmlu;
mod openbookqa;
mod piqa;
mod prepare;
mod sciq;
mod triviaqa;
mod wikitext;
mod winogrande;

use std::path::PathBuf;

pub use arc::Arc;
pub use boolq::BoolQ;
pub use catalog::{Found, SETS, all, find, groups};
pub use chosen::{Chosen, Limit, Samples, read_samples};
pub use document::Document;
pub use examples::Shots;
pub use fields::Malformed;
pub use group::Group;
pub use hellaswag::HellaSwag;
pub use lambada::Lambada;
pub use mmlu::Mmlu;
pub use openbookqa::OpenBookQa;
pub use piqa::Piqa;
pub use prepare::{Asked, Prepared, prepare};
use relufy_data::Record;
pub use sciq::SciQ;
pub use triviaqa::TriviaQa;
pub use wikitext::WikiText;
pub use winogrande::WinoGrande;

use crate::metrics::Metric;

/// What is asked of a model, and what counts as right.
pub trait Task: Send + Sync {
    /// The name in results; lm-evaluation-harness's where it is one of its tasks.
    fn name(&self) -> &str;

    /// A shorter name within its group.
    fn alias(&self) -> Option<&str> {
        None
    }

    /// Version of the prompt and metrics, as the harness counts it.
    fn version(&self) -> f64 {
        1.0
    }

    /// Where the records are.
    fn source(&self) -> Source;

    /// Where examples in front of a question come from, and which are taken.
    fn shots(&self) -> Shots {
        Shots::None
    }

    /// How many examples stand in front of a question unless told otherwise.
    fn shots_by_default(&self) -> usize {
        0
    }

    /// What stands in front of everything.
    fn description(&self) -> String {
        String::new()
    }

    /// What is measured, the main metric first.
    fn metrics(&self) -> &'static [Metric];

    /// What is done to answers before they are judged, by the harness's name.
    fn filter(&self) -> &'static str {
        "none"
    }

    /// The record as the task sees it: the harness's `process_docs`, which adds fields.
    ///
    /// # Errors
    /// A field that is missing or makes no sense.
    fn process(&self, record: Record) -> std::result::Result<Record, Malformed> {
        Ok(record)
    }

    /// The requests that one (processed) record becomes, without examples.
    ///
    /// # Errors
    /// A field that is missing or makes no sense.
    fn document(&self, record: &Record) -> std::result::Result<Document, Malformed>;
}

/// Where a task's records are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A split of a Hugging Face dataset.
    Split {
        /// `org/name`.
        repo: &'static str,
        /// The configuration.
        config: &'static str,
        /// The split.
        split: &'static str,
    },
    /// A jsonl or parquet file.
    File(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Split { repo, config, split } => write!(f, "{repo}/{config}/{split}"),
            Source::File(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::request::Compat;
    use crate::session::{Answer, Scored};

    /// A record with the fields of every task, by their types in each.
    fn records() -> Vec<Value> {
        let choices = json!({"text": ["a", "b"], "label": ["A", "B"]});
        vec![
            json!({"question": "q", "choices": choices, "answerKey": "B", "text": "a b",
                "goal": "g", "sol1": "a", "sol2": "b", "label": 1, "page": "= a =\n",
                "question_stem": "s", "passage": "p", "activity_label": "l", "ctx_a": "a",
                "ctx_b": "b", "endings": ["x", "y"], "sentence": "a _ b", "option1": "x",
                "option2": "y", "answer": "2", "support": "s", "distractor1": "a",
                "distractor2": "b", "distractor3": "c", "correct_answer": "d"}),
            json!({"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3}),
            json!({"question": "q", "answer": {"aliases": ["a", "b"]}}),
        ]
    }

    /// `value` with each of its parts in turn missing, or replaced by what it may not be.
    fn broken(value: &Value) -> Vec<Value> {
        let junk = [
            json!(null),
            json!(-1),
            json!(1e300),
            json!(""),
            json!([]),
            json!({}),
            json!(["", null]),
            json!(true),
            json!("\u{1f}é_[ "),
            json!(u64::MAX),
        ];
        let mut all: Vec<Value> = junk.to_vec();
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    let mut without = fields.clone();
                    without.remove(name);
                    all.push(without.into());
                    all.extend(broken(field).into_iter().map(|field| {
                        let mut with = fields.clone();
                        with.insert(name.clone(), field);
                        with.into()
                    }));
                }
            }
            Value::Array(items) if !items.is_empty() => all.push(items[1..].to_vec().into()),
            _ => {}
        }
        all
    }

    #[test]
    fn no_record_breaks_a_task() {
        let scored = |logprob| {
            Answer::Likelihood(Scored {
                logprob,
                is_greedy: true,
                context_tokens: 1,
                continuation_tokens: 1,
                truncated: 0,
            })
        };
        let (mut made, mut refused) = (0, 0);
        let records: Vec<Value> = records().iter().flat_map(broken).chain(records()).collect();
        for task in all() {
            for record in records.iter().filter_map(Value::as_object) {
                let processed = task.process(record.clone());
                match processed.and_then(|record| task.document(&record)) {
                    Err(why) => {
                        assert!(why.0.starts_with("field `"), "{}: {why}", task.name());
                        refused += 1;
                    }
                    Ok(document) => {
                        let answer = |at| match &document.requests()[at] {
                            crate::Request::Generate { .. } => Answer::Text("a".into()),
                            _ => scored(-(at as f64)),
                        };
                        let answers: Vec<Answer> =
                            (0..document.requests().len()).map(answer).collect();
                        assert!(!answers.is_empty(), "{}", task.name());
                        for metric in task.metrics() {
                            let point = document.value(*metric, &answers, Compat::Current);
                            assert!(point.value.is_finite() && point.weight >= 0.0);
                        }
                        document.example();
                        made += 1;
                    }
                }
            }
        }
        assert!(made > 1000 && refused > 1000, "{made} made, {refused} refused");
    }
}
