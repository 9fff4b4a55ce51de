//! The little world: people, towns, animals and things with facts about them, the text that
//! tells these facts, and the questions that ask them.
//!
//! A model that learned the text knows the answers, so that zero-shot accuracy means something
//! even for a model of a few megabytes that was never near a download. Everything is a function
//! of the seed. The tasks measure knowledge, not memory of sentences: a tested fact is told in
//! prose only, and the phrasing that asks it occurs nowhere in the text, for any fact.

mod animals;
mod dice;
mod facts;
mod people;
mod prose;
mod relation;
mod tasks;
#[cfg(test)]
mod tests;
mod things;
mod towns;
mod vocab;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use dice::Dice;
use facts::Facts;
use prose::Author;
pub use tasks::{Choices, Passage, Question};

/// The streams of [`Dice`], one for each purpose.
mod stream {
    pub const FACTS: u64 = 0;
    pub const TRAIN: u64 = 1;
    pub const VALIDATION: u64 = 2;
    pub const QUESTIONS: u64 = 3;
    pub const PASSAGES: u64 = 4;
    pub const CONTEXTS: u64 = 5;
}

/// How much to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Bytes of training text (without the JSON around it); the last document ends behind it.
    pub train_bytes: usize,
    /// Bytes of held-out text: documents that the training text does not contain.
    pub validation_bytes: usize,
    /// In how many held-out phrasings each tested fact is asked; at most 4.
    pub questions_per_fact: usize,
    /// Tokens of the vocabulary, the three special ones included.
    pub vocab_size: usize,
    /// What `tokenizer_config.json` says of the longest sequence, in tokens.
    pub max_length: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            train_bytes: 6_000_000,
            validation_bytes: 100_000,
            questions_per_fact: 2,
            vocab_size: 1280,
            max_length: 256,
        }
    }
}

/// What [`World::write`] wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The world's seed.
    pub seed: u64,
    /// What was asked for.
    pub sizes: Sizes,
    /// Facts that hold in the world.
    pub facts: usize,
    /// Those of them that the tasks ask.
    pub tested_facts: usize,
    /// Training documents, one JSON object `{"text": ..}` a line.
    pub train: Part,
    /// Held-out documents, likewise.
    pub validation: Part,
    /// Multiple-choice questions in the schema of `ai2_arc`.
    pub questions: Part,
    /// Passages in the schema of `lambada`.
    pub passages: Part,
    /// Folder of `tokenizer.json` and `tokenizer_config.json`, relative to the world's.
    pub tokenizer: PathBuf,
}

/// One file of the world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its path, relative to the world's folder.
    pub file: PathBuf,
    /// Its lines.
    pub lines: usize,
    /// Its bytes.
    pub bytes: usize,
}

/// A little world.
#[derive(Debug)]
pub struct World {
    seed: u64,
    facts: Facts,
}

#[derive(Serialize)]
struct Document<'a> {
    text: &'a str,
}

impl World {
    /// The world of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, facts: Facts::draw(Dice::new(seed, stream::FACTS)) }
    }

    /// Training documents of at least `bytes` bytes together.
    pub fn training_text(&self, bytes: usize) -> Vec<String> {
        self.text(stream::TRAIN, bytes, |_| true)
    }

    /// Documents of at least `bytes` bytes together, none of them in `training`.
    pub fn validation_text(&self, bytes: usize, training: &[String]) -> Vec<String> {
        let seen: HashSet<&str> = training.iter().map(String::as_str).collect();
        self.text(stream::VALIDATION, bytes, |document| !seen.contains(document))
    }

    fn text(&self, stream: u64, bytes: usize, keep: impl Fn(&str) -> bool) -> Vec<String> {
        let mut author = Author::new(&self.facts, Dice::new(self.seed, stream));
        let (mut documents, mut written) = (Vec::new(), 0);
        while written < bytes {
            let document = author.document();
            if keep(&document) {
                written += document.len();
                documents.push(document);
            }
        }
        documents
    }

    /// The multiple-choice task: every tested fact in `per_fact` phrasings (at most 4).
    pub fn questions(&self, per_fact: usize) -> Vec<Question> {
        tasks::questions(&self.facts, per_fact, Dice::new(self.seed, stream::QUESTIONS))
    }

    /// The cloze task: one passage for every tested fact.
    pub fn passages(&self) -> Vec<Passage> {
        let contexts = Dice::new(self.seed, stream::CONTEXTS);
        tasks::passages(&self.facts, contexts, Dice::new(self.seed, stream::PASSAGES))
    }

    /// Writes text, tasks and tokenizer into `dir`, which is made if it is missing, and last of
    /// all `manifest.json`: where that stands, the rest is whole.
    ///
    /// # Errors
    /// [`Error::Io`] with the path that could not be written; [`Error::Tokenizer`] where the
    /// text is too short for the wanted vocabulary.
    pub fn write(&self, dir: &Path, sizes: &Sizes) -> Result<Manifest> {
        let tokenizer = PathBuf::from("tokenizer");
        let folder = dir.join(&tokenizer);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let train = self.training_text(sizes.train_bytes);
        let validation = self.validation_text(sizes.validation_bytes, &train);
        let text = |documents: &[String], file| {
            lines(dir, file, documents.iter().map(|text| Document { text }))
        };
        let vocabulary = vocab::train(train.iter().map(String::as_str), sizes.vocab_size)?;
        save(&folder.join("tokenizer.json"), vocabulary.as_bytes())?;
        save(&folder.join("tokenizer_config.json"), &pretty(&vocab::config(sizes.max_length))?)?;
        let manifest = Manifest {
            seed: self.seed,
            sizes: sizes.clone(),
            facts: self.facts.facts.len(),
            tested_facts: self.facts.facts.iter().filter(|fact| fact.tested).count(),
            train: text(&train, "train.jsonl")?,
            validation: text(&validation, "validation.jsonl")?,
            questions: lines(dir, "questions.jsonl", self.questions(sizes.questions_per_fact))?,
            passages: lines(dir, "passages.jsonl", self.passages())?,
            tokenizer,
        };
        save(&dir.join("manifest.json"), &pretty(&manifest)?)?;
        Ok(manifest)
    }
}

fn pretty(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn lines<T: Serialize>(dir: &Path, file: &str, rows: impl IntoIterator<Item = T>) -> Result<Part> {
    let (mut bytes, mut lines) = (Vec::new(), 0);
    for row in rows {
        serde_json::to_writer(&mut bytes, &row)?;
        bytes.push(b'\n');
        lines += 1;
    }
    save(&dir.join(file), &bytes)?;
    Ok(Part { file: file.into(), lines, bytes: bytes.len() })
}

/// Writes under a temporary name, syncs, renames: a reader never sees half a file.
fn save(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".part");
    let draft = PathBuf::from(draft);
    let mut file = fs::File::create(&draft).map_err(Error::io(&draft))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(&draft))?;
    fs::rename(&draft, path).map_err(Error::io(path))
}
