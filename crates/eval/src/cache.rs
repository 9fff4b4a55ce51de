//! Answers that are kept in a file, so that a killed evaluation goes on where it ended.
//!
//! One line of JSON a document, appended as soon as all its requests are answered. A line
//! without an end is what a killed process left: it is cut off. A document is known by the
//! model's weights, the rules of tokenising and its requests, so that a changed model or
//! prompt is asked again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::request::{Request, Rules};
use crate::session::Answered;
use crate::{Error, Result};

/// What stands for a document: a hash of the model, the rules and the requests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(String);

/// Answers that are kept; in memory for nobody, or in a file.
#[derive(Default)]
pub struct Cache {
    file: Option<Kept>,
}

struct Kept {
    path: PathBuf,
    file: File,
    /// Of the model and the rules.
    identity: blake3::Hash,
    known: HashMap<Key, Answered>,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    key: Key,
    /// For people who look into the file.
    task: std::borrow::Cow<'a, str>,
    answered: std::borrow::Cow<'a, Answered>,
}

impl Cache {
    /// Keeps nothing.
    pub fn none() -> Cache {
        Cache::default()
    }

    /// Opens the file, or begins it. `model` stands for the weights, surgery included; it
    /// stays locked until the cache is dropped.
    ///
    /// # Errors
    /// A file that cannot be opened, that another evaluation is using, or a line in it that
    /// is no answer.
    pub fn open(path: &Path, model: &str, rules: Rules) -> Result<Cache> {
        let write = |source| Error::Write { path: path.to_path_buf(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(write)?;
        }
        let options = OpenOptions::new().read(true).append(true).create(true).clone();
        let mut file = options.open(path).map_err(write)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Cache {
                    path: path.to_path_buf(),
                    why: "another evaluation is using it".into(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(write(source)),
        }
        let known = read(&mut file, path)?;
        let mut identity = blake3::Hasher::new();
        identity.update(model.as_bytes());
        identity.update(&serde_json::to_vec(&rules)?);
        let identity = identity.finalize();
        Ok(Cache { file: Some(Kept { path: path.to_path_buf(), file, identity, known }) })
    }

    /// How many documents the file holds, of whatever model.
    pub fn len(&self) -> usize {
        self.file.as_ref().map_or(0, |kept| kept.known.len())
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key of a document's requests.
    ///
    /// # Errors
    /// None in practice: requests are plain text.
    pub fn key(&self, requests: &[Request]) -> Result<Key> {
        let Some(kept) = &self.file else { return Ok(Key(String::new())) };
        let mut hasher = blake3::Hasher::new();
        hasher.update(kept.identity.as_bytes());
        hasher.update(&serde_json::to_vec(requests)?);
        Ok(Key(hasher.finalize().to_hex().to_string()))
    }

    /// What is known of a document.
    pub fn find(&self, key: &Key) -> Option<Answered> {
        self.file.as_ref()?.known.get(key).cloned()
    }

    /// Keeps a document's answers.
    ///
    /// # Errors
    /// A disk that is full, or another failure to write.
    pub fn keep(&mut self, task: &str, key: &Key, answered: &Answered) -> Result<()> {
        let Some(kept) = &mut self.file else { return Ok(()) };
        let answered = std::borrow::Cow::Borrowed(answered);
        let mut line = serde_json::to_vec(&Line { key: key.clone(), task: task.into(), answered })?;
        line.push(b'\n');
        // One write a line, unbuffered: what is answered survives the process.
        let written = kept.file.write_all(&line);
        written.map_err(|source| Error::Write { path: kept.path.clone(), source })
    }
}

/// The answers in a file, which is cut after its last whole line.
fn read(file: &mut File, path: &Path) -> Result<HashMap<Key, Answered>> {
    let failed = |source| Error::Read { path: path.to_path_buf(), source };
    let mut known = HashMap::new();
    let mut whole = 0;
    let mut reader = BufReader::new(&mut *file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).map_err(failed)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let Line { key, answered, .. } =
            serde_json::from_slice(&line).map_err(|why| Error::Cache {
                path: path.to_path_buf(),
                why: format!("line {number} is no answer: {why}"),
            })?;
        known.insert(key, answered.into_owned());
        whole += length as u64;
    }
    let write = |source| Error::Write { path: path.to_path_buf(), source };
    file.set_len(whole).map_err(write)?;
    file.seek(SeekFrom::End(0)).map_err(write)?;
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::Activity;
    use crate::request::{Compat, Exclusion};
    use crate::session::{Answer, Scored};

    const RULES: Rules = Rules { max_length: 9, compat: Compat::Current };

    fn answered(logprob: f64) -> Answered {
        let scored = Scored {
            logprob,
            is_greedy: true,
            context_tokens: 3,
            continuation_tokens: 1,
            truncated: 0,
        };
        let mut activity = Activity::new(2);
        activity.tokens = 3;
        activity.nonzero[1][2] = 7;
        let answers = vec![Ok(Answer::Likelihood(scored)), Err(Exclusion::NoContextToken)];
        Answered { answers, activity }
    }

    #[test]
    fn what_was_kept_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/cache.jsonl");
        let requests = [Request::likelihood("a\u{2028}\n", " b")];
        // A number that short decimal forms would not bring back.
        let given = answered(-1.000_000_000_000_000_2 / 3.0);
        let mut cache = Cache::open(&path, "model", RULES).unwrap();
        let key = cache.key(&requests).unwrap();
        cache.keep("task", &key, &given).unwrap();
        let in_use = Cache::open(&path, "model", RULES).err().unwrap().to_string();
        assert!(in_use.contains("another evaluation"), "{in_use}");
        drop(cache);
        let cache = Cache::open(&path, "model", RULES).unwrap();
        assert_eq!(cache.find(&cache.key(&requests).unwrap()), Some(given));
        drop(cache);
        for (model, rules) in [("other", RULES), ("model", Rules { max_length: 8, ..RULES })] {
            let cache = Cache::open(&path, model, rules).unwrap();
            assert_eq!((cache.len(), cache.find(&cache.key(&requests).unwrap())), (1, None));
        }
    }

    #[test]
    fn a_torn_line_is_cut_off_and_a_broken_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.jsonl");
        let keep = |logprob: f64| {
            let mut cache = Cache::open(&path, "model", RULES).unwrap();
            let request = Request::likelihood("a", logprob.to_string());
            let key = cache.key(&[request]).unwrap();
            cache.keep("task", &key, &answered(logprob)).unwrap();
            cache.len()
        };
        assert_eq!((keep(-1.0), keep(-2.0)), (0, 1));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        assert_eq!(keep(-3.0), 1);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        std::fs::write(&path, format!("{{\"key\": 1}}\n{text}")).unwrap();
        let why = Cache::open(&path, "model", RULES).err().unwrap().to_string();
        assert!(why.contains("line 1 is no answer"), "{why}");
    }
}
