//! From a task's files to the documents that are asked: which records, and with which
//! examples in front of them.

use relufy_data::{Progress, Record, TaskData};
use serde::{Deserialize, Serialize};

use super::{Document, Source, Task};
use crate::{Error, Result};

/// Which documents of each task are asked, and how.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chosen {
    /// Only so many of each task.
    pub limit: Option<Limit>,
    /// Examples in front of each question; `None`: the task's own number, which is 0.
    pub shots: Option<usize>,
}

/// Only the first documents of a task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Limit {
    /// So many.
    Count(usize),
    /// This share of the split, rounded up.
    Share(f64),
}

impl Limit {
    /// How many of `documents`.
    pub fn of(self, documents: usize) -> usize {
        match self {
            Limit::Count(count) => count.min(documents),
            Limit::Share(share) => ((share * documents as f64).ceil() as usize).min(documents),
        }
    }
}

/// Where examples come from, and which are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shots {
    /// The task has no split to draw from.
    None,
    /// The first of this split.
    First(&'static str),
    /// Drawn from this split, with Python's random numbers.
    Drawn(&'static str),
}

/// A document as it is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Its index in the split, from 0.
    pub id: usize,
    /// Its record, as the task sees it.
    pub record: Record,
    /// Requests and judgement.
    pub document: Document,
}

/// A task's documents.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// Those that are asked.
    pub documents: Vec<Asked>,
    /// How many the split has.
    pub split_documents: usize,
    /// Examples in front of each.
    pub shots: usize,
}

/// Loads a task's records and makes documents of those that are chosen.
///
/// # Errors
/// A missing split; a record without what the task needs, by task, file and number.
pub fn prepare(
    task: &dyn Task,
    data: &TaskData,
    chosen: &Chosen,
    progress: &dyn Progress,
) -> Result<Prepared> {
    let source = task.source();
    let records = match &source {
        Source::Split { repo, config, split } => data.load_split(repo, config, split, progress)?,
        Source::File(path) => relufy_data::taskdata::load_file(path)?,
    };
    let split_documents = records.len();
    let kept = chosen.limit.map_or(split_documents, |limit| limit.of(split_documents));
    let documents = records
        .into_iter()
        .take(kept)
        .enumerate()
        .map(|(id, record)| {
            let record = task.process(record);
            let made = record.and_then(|record| Ok((task.document(&record)?, record)));
            let (document, record) = made.map_err(|why| Error::Record {
                task: task.name().into(),
                source_name: source.to_string(),
                record: id + 1,
                why: why.to_string(),
            })?;
            Ok(Asked { id, record, document })
        })
        .collect::<Result<_>>()?;
    Ok(Prepared { documents, split_documents, shots: 0 })
}
