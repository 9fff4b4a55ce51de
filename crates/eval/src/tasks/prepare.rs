//! From a task's files to the documents that are asked: which records, and with which
//! examples in front of them.

use relufy_data::taskdata::{self, Split};
use relufy_data::{Progress, Record, TaskData};

use super::examples::Examples;
use super::{Chosen, Document, Source, Task};
use crate::{Error, Result};

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
/// A missing split; a record without what the task needs, by task, file and number; fewer
/// examples than are wanted.
pub fn prepare(
    task: &dyn Task,
    data: &TaskData,
    chosen: &Chosen,
    progress: &dyn Progress,
) -> Result<Prepared> {
    let split = load(task, &task.source(), data, progress)?;
    let ids = chosen.ids(task.name(), split.records.len())?;
    let shots = chosen.shots.unwrap_or(task.shots_by_default());
    let mut examples = Examples::new(task, &split, data, shots, chosen.fewshot_seed, progress)?;
    let description = task.description();
    let documents = ids
        .into_iter()
        .map(|id| {
            let (record, document) = made(task, &split, id)?;
            let document = document.after(&(description.clone() + &examples.before(&record)?));
            Ok(Asked { id, record, document })
        })
        .collect::<Result<_>>()?;
    Ok(Prepared { documents, split_documents: split.records.len(), shots })
}

/// The records of `source`, for `task`.
pub(super) fn load(
    task: &dyn Task,
    source: &Source,
    data: &TaskData,
    progress: &dyn Progress,
) -> Result<Split> {
    let split = match source {
        Source::Split { repo, config, split } => data.load_split(repo, config, split, progress),
        Source::File(path) => taskdata::load_file(path),
    };
    split.map_err(|source| Error::TaskData { task: task.name().into(), source: Box::new(source) })
}

/// Record `index` of a split as the task sees it, and its document.
pub(super) fn made(task: &dyn Task, split: &Split, index: usize) -> Result<(Record, Document)> {
    let record = split.records.get(index).cloned().unwrap_or_default();
    let made = task.process(record).and_then(|record| Ok((task.document(&record)?, record)));
    let (document, record) = made.map_err(|why| {
        let (file, record) = split.place(index);
        Error::Record {
            task: task.name().into(),
            source_name: file.display().to_string(),
            record,
            why: why.to_string(),
        }
    })?;
    Ok((record, document))
}
