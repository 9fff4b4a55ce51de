//! Which documents of each task are asked, and how.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Task;
use crate::{Error, Result};

/// Which documents of each task are asked, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// Only so many of each task.
    pub limit: Option<Limit>,
    /// Only these of the tasks named, as indices in their splits from 0; all of the others.
    /// They are asked in the split's order, each once.
    pub samples: Option<Samples>,
    /// Examples in front of each question; `None`: the task's own number.
    pub shots: Option<usize>,
    /// Seed of the draws of examples; each task has a stream of its own.
    pub fewshot_seed: u64,
}

/// Indices of documents by task.
pub type Samples = BTreeMap<String, Vec<usize>>;

impl Default for Chosen {
    fn default() -> Chosen {
        Chosen { limit: None, samples: None, shots: None, fewshot_seed: 1234 }
    }
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

impl Chosen {
    /// Whether the choice makes sense for `tasks`.
    ///
    /// # Errors
    /// A limit beside samples, of which the harness allows one; samples of a task that is not
    /// among them.
    pub fn check(&self, tasks: &[Box<dyn Task>]) -> Result<()> {
        let Some(samples) = &self.samples else { return Ok(()) };
        if self.limit.is_some() {
            return Err(refused("no limit beside them", "both"));
        }
        let named = |name: &String| tasks.iter().any(|task| task.name() == name);
        match samples.keys().find(|name| !named(name)) {
            Some(name) => Err(refused("names of the tasks that are run", format!("`{name}`"))),
            None => Ok(()),
        }
    }

    /// Which of a task's documents are asked.
    ///
    /// # Errors
    /// An index beyond the split, or none at all.
    pub fn ids(&self, task: &str, documents: usize) -> Result<Vec<usize>> {
        let Some(samples) = self.samples.as_ref().and_then(|samples| samples.get(task)) else {
            let kept = self.limit.map_or(documents, |limit| limit.of(documents));
            return Ok((0..kept).collect());
        };
        let mut ids = samples.clone();
        ids.sort_unstable();
        ids.dedup();
        match ids.last() {
            Some(&last) if last < documents => Ok(ids),
            Some(last) => {
                Err(refused(format!("indices below {documents} for task `{task}`"), last))
            }
            None => Err(refused(format!("at least one index for task `{task}`"), "none")),
        }
    }
}

/// The samples in `argument`: `{"TASK": [0, 3]}`, or a file that holds this.
///
/// # Errors
/// A file that cannot be read; anything else.
pub fn read_samples(argument: &str) -> Result<Samples> {
    let path = Path::new(argument);
    let text = match path.is_file() {
        true => std::fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_path_buf(), source })?,
        false => argument.to_owned(),
    };
    serde_json::from_str(&text).map_err(|error| {
        refused("{\"TASK\": [0, 3]}, or a file that holds this", format!("{argument} ({error})"))
    })
}

fn refused(expected: impl Into<String>, found: impl ToString) -> Error {
    Error::Setting { what: "samples", expected: expected.into(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Piqa;

    fn samples(json: &str) -> Chosen {
        Chosen { samples: Some(read_samples(json).unwrap()), ..Chosen::default() }
    }

    #[test]
    fn limits_count_or_share() {
        let ids = |limit| Chosen { limit: Some(limit), ..Chosen::default() }.ids("t", 7).unwrap();
        assert_eq!(ids(Limit::Count(2)), [0, 1]);
        assert_eq!(ids(Limit::Count(9)).len(), 7);
        assert_eq!(ids(Limit::Share(0.3)), [0, 1, 2]);
        assert_eq!(Chosen::default().ids("t", 2).unwrap(), [0, 1]);
    }

    #[test]
    fn samples_are_asked_in_the_split_s_order() {
        let chosen = samples(r#"{"piqa": [5, 2, 5], "empty": []}"#);
        assert_eq!(chosen.ids("piqa", 6).unwrap(), [2, 5]);
        assert_eq!(chosen.ids("other", 2).unwrap(), [0, 1]);
        let why = |task| chosen.ids(task, 5).unwrap_err().to_string();
        assert!(
            why("piqa").contains("indices below 5 for task `piqa`, found 5"),
            "{}",
            why("piqa")
        );
        assert!(why("empty").contains("at least one"), "{}", why("empty"));
    }

    #[test]
    fn samples_are_read_from_a_file_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"piqa": [1]}"#).unwrap();
        assert_eq!(read_samples(file.path().to_str().unwrap()).unwrap()["piqa"], [1]);
        for bad in ["[1]", "{\"piqa\": [-1]}", "no-such-file.json"] {
            let why = read_samples(bad).unwrap_err().to_string();
            assert!(why.contains("samples: expected {\"TASK\"") && why.contains(bad), "{why}");
        }
    }

    #[test]
    fn what_would_be_passed_over_in_silence_is_refused() {
        let tasks: Vec<Box<dyn Task>> = vec![Box::new(Piqa)];
        assert!(samples(r#"{"piqa": [1]}"#).check(&tasks).is_ok());
        let typo = samples(r#"{"pika": [1]}"#).check(&tasks).unwrap_err().to_string();
        assert!(typo.contains("`pika`"), "{typo}");
        let both = Chosen { limit: Some(Limit::Count(1)), ..samples(r#"{"piqa": [1]}"#) };
        assert!(both.check(&tasks).is_err());
    }
}
