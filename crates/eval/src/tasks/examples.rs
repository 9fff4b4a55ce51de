//! Examples in front of a question: which ones, and how they read.

use std::borrow::Cow;

use relufy_data::taskdata::Split;
use relufy_data::{Progress, Record, TaskData};

use super::prepare::{load, made};
use super::{Document, Source, Task};
use crate::python::Random;
use crate::{Error, Result};

/// Where examples come from, and which are taken. A task of one's own file takes them from
/// that file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shots {
    /// Examples would change nothing.
    None,
    /// The first of this split, in order.
    First(&'static str),
    /// Drawn with Python's random numbers, anew for each document.
    Drawn {
        /// From this split.
        split: &'static str,
        /// Whether records that equal the one asked are left out. (The harness does this
        /// for tasks without a test split, wherever the examples come from.)
        apart: bool,
    },
}

/// The examples of a task's documents, which must be asked for in their order: all draws
/// come from one stream.
pub(super) struct Examples<'a> {
    task: &'a dyn Task,
    count: usize,
    way: Way<'a>,
}

enum Way<'a> {
    Same(String),
    Drawn { pool: Cow<'a, Split>, random: Random, apart: bool },
}

impl<'a> Examples<'a> {
    /// `count` examples for each of the documents of `own`.
    pub(super) fn new(
        task: &'a dyn Task,
        own: &'a Split,
        data: &TaskData,
        count: usize,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<Examples<'a>> {
        let pool = |split| match task.source() {
            Source::Split { split: asked, .. } if asked == split => Ok(Cow::Borrowed(own)),
            Source::Split { repo, config, .. } => {
                load(task, &Source::Split { repo, config, split }, data, progress).map(Cow::Owned)
            }
            Source::File(_) => Ok(Cow::Borrowed(own)),
        };
        let way = match task.shots() {
            _ if count == 0 => Way::Same(String::new()),
            Shots::None => Way::Same(String::new()),
            Shots::First(split) => {
                let pool = pool(split)?;
                if count > pool.records.len() {
                    return Err(too_few(task, &pool, count));
                }
                let made = (0..count).map(|index| Ok(made(task, &pool, index)?.1.example()));
                Way::Same(made.collect::<Result<_>>()?)
            }
            Shots::Drawn { split, apart } => {
                Way::Drawn { pool: pool(split)?, random: Random::new(seed), apart }
            }
        };
        Ok(Examples { task, count, way })
    }

    /// The text in front of the next document.
    pub(super) fn before(&mut self, asked: &Record) -> Result<String> {
        let (task, count) = (self.task, self.count);
        let (pool, random, apart) = match &mut self.way {
            Way::Same(text) => return Ok(text.clone()),
            Way::Drawn { pool, random, apart } => (&**pool, random, *apart),
        };
        // One more is drawn where one may have to go.
        let (records, drawn) = (pool.records.len(), count + usize::from(apart));
        let drawn = random.sample(records, drawn).ok_or_else(|| too_few(task, pool, drawn))?;
        let mut examples = documents(task, pool, drawn, |record| !apart || record != asked)?;
        if examples.len() < count {
            // The record is there more than once: draw from all that differ.
            let others = documents(task, pool, 0..records, |record| record != asked)?;
            let same = records - others.len();
            let drawn = random.sample(others.len(), count);
            let drawn = drawn.ok_or_else(|| too_few(task, pool, count + same))?;
            examples = drawn.into_iter().filter_map(|at| others.get(at).cloned()).collect();
        }
        Ok(examples.iter().take(count).map(Document::example).collect())
    }
}

/// The documents of those of the records `indices` that are `kept`.
fn documents(
    task: &dyn Task,
    pool: &Split,
    indices: impl IntoIterator<Item = usize>,
    kept: impl Fn(&Record) -> bool,
) -> Result<Vec<Document>> {
    let all = indices.into_iter().map(|index| made(task, pool, index));
    let kept = |made: &Result<(Record, Document)>| made.as_ref().map_or(true, |(it, _)| kept(it));
    all.filter(kept).map(|made| Ok(made?.1)).collect()
}

fn too_few(task: &dyn Task, pool: &Split, wanted: usize) -> Error {
    let file = pool.files.first().map_or_else(String::new, |(file, _)| file.display().to_string());
    let found = pool.records.len();
    Error::TooFewExamples { task: task.name().into(), source_name: file, wanted, found }
}
