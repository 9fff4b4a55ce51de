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
