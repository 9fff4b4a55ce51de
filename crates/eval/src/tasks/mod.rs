//! Tasks: what is asked of a model, and what counts as right.
//!
//! A task turns each record of a dataset into a [`Document`]; everything else (loading,
//! tokenising, scoring, metrics, exclusions) is the same for all. The shapes of documents
//! are in `document.rs`, so that a task is about one screen. Prompts, splits and metrics
//! are those of lm-evaluation-harness 0.4.13.

mod arc;
mod document;
mod fields;
mod lambada;
mod group;
mod piqa;
mod prepare;

use std::path::PathBuf;

pub use arc::Arc;
pub use document::Document;
pub use fields::Malformed;
pub use group::Group;
pub use lambada::Lambada;
pub use piqa::Piqa;
pub use prepare::{Asked, Chosen, Limit, Prepared, Shots, prepare};
use relufy_data::Record;

use crate::metrics::Metric;
use crate::{Error, Result};

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

/// Every task that has a name of its own.
pub fn all() -> Vec<Box<dyn Task>> {
    vec![
        Box::new(Lambada::openai()),
        Box::new(Arc::easy()),
        Box::new(Arc::challenge()),
        Box::new(Piqa),
    ]
}

/// The task called `reference`: a name from [`all`]; `NAME=PATH` for a file of
/// multiple-choice questions in the schema of ai2_arc; `NAME=lambada:PATH` for a file of
/// passages whose last word is to be found.
///
/// # Errors
/// An unknown name.
pub fn find(reference: &str) -> Result<Box<dyn Task>> {
    if let Some((name, path)) = reference.split_once('=') {
        return Ok(match path.strip_prefix("lambada:") {
            Some(path) => Box::new(Lambada::file(name, path)),
            None => Box::new(Arc::file(name, path)),
        });
    }
    let tasks = all();
    let known = tasks.iter().map(|task| task.name().to_owned()).collect::<Vec<_>>().join(", ");
    tasks
        .into_iter()
        .find(|task| task.name() == reference)
        .ok_or_else(|| Error::UnknownTask { name: reference.to_owned(), known })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_unknown_ones_refused() {
        for task in all() {
            assert_eq!(find(task.name()).unwrap().name(), task.name());
        }
        let error = find("arc_eazy").err().unwrap().to_string();
        assert!(error.contains("arc_eazy") && error.contains("arc_easy"), "{error}");
        let facts = find("facts=world/facts.jsonl").unwrap();
        assert_eq!(facts.name(), "facts");
        assert_eq!(facts.source(), Source::File("world/facts.jsonl".into()));
        let cloze = find("cloze=lambada:world/passages.jsonl").unwrap();
        assert_eq!(cloze.source(), Source::File("world/passages.jsonl".into()));
        assert_eq!(cloze.metrics(), Lambada::openai().metrics());
    }
}
