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
    Drawn { pool: Cow<'a, Split>, random: Box<Random>, apart: bool },
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
                Way::Drawn { pool: pool(split)?, random: Box::new(Random::new(seed)), apart }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metric;
    use crate::tasks::fields::{Malformed, text};
    use crate::tasks::{Chosen, prepare};

    /// Questions `q`, whose record is their answer; examples from `split`.
    struct Toy {
        file: std::path::PathBuf,
        shots: Shots,
    }

    impl Task for Toy {
        fn name(&self) -> &str {
            "toy"
        }

        fn source(&self) -> Source {
            match self.file.as_os_str().is_empty() {
                true => Source::Split { repo: "org/toy", config: "default", split: "test" },
                false => Source::File(self.file.clone()),
            }
        }

        fn shots(&self) -> Shots {
            self.shots
        }

        fn description(&self) -> String {
            "D. ".into()
        }

        fn metrics(&self) -> &'static [Metric] {
            &[Metric::Acc]
        }

        fn document(&self, record: &Record) -> std::result::Result<Document, Malformed> {
            Ok(Document::choice("?".into(), &[text(record, "a")?], 0))
        }
    }

    /// The contexts of a toy task whose splits hold these answers, without what all share.
    fn contexts(
        shots: Shots,
        test: &[&str],
        train: &[&str],
        chosen: &Chosen,
    ) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let splits = folder.path().join("org/toy/default");
        std::fs::create_dir_all(&splits).unwrap();
        for (split, answers) in [("test", test), ("train", train)] {
            let lines: String = answers.iter().map(|a| format!("{{\"a\": \"{a}\"}}\n")).collect();
            std::fs::write(splits.join(split).with_extension("jsonl"), lines).unwrap();
        }
        let task = Toy { file: "".into(), shots };
        let data = TaskData::local(folder.path());
        let prepared = prepare(&task, &data, chosen, &relufy_data::Silent)?;
        let contexts = prepared.documents.iter().map(|asked| match &asked.document.requests()[0] {
            crate::Request::Likelihood { context, .. } => {
                let examples = context.strip_prefix("D. ").unwrap().strip_suffix('?').unwrap();
                examples.replace("? ", "").replace("\n\n", "")
            }
            other => panic!("{other:?}"),
        });
        Ok(contexts.collect())
    }

    fn two() -> Chosen {
        Chosen { shots: Some(2), ..Chosen::default() }
    }

    const LETTERS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

    #[test]
    fn the_first_are_the_same_for_all() {
        let first = |count| {
            let chosen = Chosen { shots: Some(count), ..Chosen::default() };
            contexts(Shots::First("train"), &["x", "y"], &LETTERS[..3], &chosen)
        };
        assert_eq!(first(2).unwrap(), ["ab", "ab"]);
        assert_eq!(first(0).unwrap(), ["", ""]);
        let why = first(4).unwrap_err().to_string();
        assert!(
            why.contains("task `toy`: 4 examples") && why.contains("train.jsonl has 3"),
            "{why}"
        );
    }

    #[test]
    fn one_stream_runs_through_the_documents_asked() {
        // r = random.Random(1234); ["".join(r.sample("abcdefgh", 2)) for _ in range(3)]
        let drawn = Shots::Drawn { split: "train", apart: false };
        assert_eq!(
            contexts(drawn, &["a", "b", "c"], &LETTERS, &two()).unwrap(),
            ["ha", "ah", "af"]
        );
        // Only what is asked draws.
        let samples = Some([("toy".to_owned(), vec![1, 2])].into());
        let some = Chosen { samples, ..two() };
        assert_eq!(contexts(drawn, &["a", "b", "c"], &LETTERS, &some).unwrap(), ["ha", "ah"]);
        let seeded = Chosen { fewshot_seed: 7, ..two() };
        assert_eq!(contexts(drawn, &["a"], &LETTERS, &seeded).unwrap(), ["fb"]);
        let own = Shots::Drawn { split: "test", apart: false };
        assert_eq!(contexts(own, &LETTERS, &[], &two()).unwrap()[..3], ["ha", "ah", "af"]);
    }

    #[test]
    fn a_record_is_no_example_of_itself() {
        // r = random.Random(1234)
        // ["".join([x for x in r.sample("abcdefgh", 3) if x != own][:2]) for own in "hbfx"]
        let apart = Shots::Drawn { split: "train", apart: true };
        let got = contexts(apart, &["h", "b", "f", "x"], &LETTERS, &two()).unwrap();
        assert_eq!(got, ["ag", "ge", "ag", "ba"]);
        // One more is drawn than is shown, so all but itself are not enough.
        let why = contexts(apart, &["a"], &["a", "b"], &two()).unwrap_err().to_string();
        assert!(why.contains("3 examples are to be taken") && why.contains("has 2"), "{why}");
    }

    #[test]
    fn where_copies_leave_too_few_the_others_are_drawn_from() {
        let apart = Shots::Drawn { split: "train", apart: true };
        let train = ["a", "a", "a", "a", "b", "c", "d"];
        // As above with "aaaabcd"; the first draw holds two copies, so that
        // r.sample("bcd", 2) follows.
        let got = contexts(apart, &["a", "a", "a"], &train, &two()).unwrap();
        assert_eq!(got, ["bd", "db", "cd"]);
        let why = contexts(apart, &["a"], &["a", "a", "a", "b"], &two()).unwrap_err();
        assert!(why.to_string().contains("5 examples are to be taken"), "{why}");
    }

    #[test]
    fn a_file_is_its_own_pool() {
        let file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        std::fs::write(file.path(), "{\"a\": \"a\"}\n{\"a\": \"b\"}\n{\"a\": \"c\"}\n").unwrap();
        let shots = Shots::Drawn { split: "train", apart: true };
        let task = Toy { file: file.path().into(), shots };
        let data = TaskData::local("nowhere");
        let prepared = prepare(&task, &data, &two(), &relufy_data::Silent).unwrap();
        assert_eq!(prepared.shots, 2);
        for asked in &prepared.documents {
            let crate::Request::Likelihood { context, .. } = &asked.document.requests()[0] else {
                panic!("{asked:?}")
            };
            let own = asked.record["a"].as_str().unwrap();
            assert_eq!(context.matches("\n\n").count(), 2);
            assert!(!context.contains(&format!("? {own}\n")), "{context}");
        }
    }

    #[test]
    fn an_example_that_is_malformed_is_named() {
        let chosen = Chosen { shots: Some(1), ..Chosen::default() };
        let train = "\", \"a\": 1, \"b\": \"";
        let why = contexts(Shots::First("train"), &["x"], &[train], &chosen).unwrap_err();
        let why = why.to_string();
        assert!(why.contains("task `toy`") && why.contains("train.jsonl, record 1"), "{why}");
    }
}
