//! What a run's file says about its text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ChatTemplate;
use crate::{Error, Result};

/// The text of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusConfig {
    /// Where training text comes from.
    pub sources: Vec<SourceConfig>,
    /// Text of its own for validation; excludes `validation_fraction`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<SourceConfig>,
    /// The share of each source's documents that is held out for validation, in `[0, 1)`.
    #[serde(default)]
    pub validation_fraction: f64,
    /// End each document with EOS, where its tokens do not end so already.
    #[serde(default = "yes")]
    pub add_eos: bool,
    /// Where token caches are kept; by default `$XDG_CACHE_HOME/relufy`, else
    /// `~/.cache/relufy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
}

/// One source of documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// A file, a glob, a folder (searched with its subfolders), or a file or folder of a
    /// dataset repository: `hub://org/name[@revision]/path`.
    pub path: String,
    /// Read the files as this, whatever their names say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What a record is. By default the text field where a record has it, else `messages`,
    /// else `prompt` and `completion`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The field (JSON lines) or column (parquet) with the text; `text` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_field: Option<String>,
    /// Text files: what stands between two documents, e.g. `<|endoftext|>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// Text files without a separator: what a document is; `file` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<TextSplit>,
    /// The share of sequences that come from here, relative to the other sources'. Give it
    /// to all sources or to none; with none, each sequence is seen once an epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Read no more than so many documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// How `messages` become text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<ChatTemplate>,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Plain text.
    Text,
    /// A JSON object a line.
    Jsonl,
    /// Apache parquet.
    Parquet,
}

/// What a record of JSON lines or parquet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// A text field.
    Text,
    /// `messages`: a list of `{role, content}`; only the assistant's are learnt.
    Messages,
    /// `prompt` and `completion`; only the completion is learnt.
    PromptCompletion,
}

/// What a document of a text file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextSplit {
    /// The whole file.
    File,
    /// A line.
    Line,
    /// Lines up to a blank one.
    BlankLine,
}

impl Default for CorpusConfig {
    fn default() -> Self {
        CorpusConfig {
            sources: Vec::new(),
            validation: Vec::new(),
            validation_fraction: 0.0,
            add_eos: true,
            cache_dir: None,
        }
    }
}

impl SourceConfig {
    /// A source with nothing but a path.
    pub fn new(path: impl Into<String>) -> Self {
        SourceConfig { path: path.into(), ..SourceConfig::default() }
    }

    /// The name of the text field.
    pub fn text_field(&self) -> &str {
        self.text_field.as_deref().unwrap_or("text")
    }

    /// Refuses settings that contradict each other.
    pub(crate) fn check(&self) -> Result<()> {
        if self.path.is_empty() {
            return Err(Error::config("path", "is empty"));
        }
        if self.separator.is_some() && self.split.is_some() {
            return Err(Error::config("split", "excludes `separator`"));
        }
        if self.separator.as_deref() == Some("") {
            return Err(Error::config("separator", "is empty"));
        }
        if self.weight.is_some_and(|weight| !(weight.is_finite() && weight > 0.0)) {
            return Err(Error::config("weight", "must be a number above 0"));
        }
        if self.limit == Some(0) {
            return Err(Error::config("limit", "must be at least 1"));
        }
        let text_only = self.separator.is_some() || self.split.is_some();
        if text_only && self.format.is_some_and(|format| format != Format::Text) {
            return Err(Error::config("format", "`separator` and `split` are for text files"));
        }
        Ok(())
    }
}

impl CorpusConfig {
    /// Refuses settings that contradict each other.
    pub(crate) fn check(&self) -> Result<()> {
        if self.sources.is_empty() {
            return Err(Error::config("sources", "is empty"));
        }
        for source in self.sources.iter().chain(&self.validation) {
            source.check()?;
        }
        let weights = self.sources.iter().filter(|source| source.weight.is_some()).count();
        if weights != 0 && weights != self.sources.len() {
            return Err(Error::config("weight", "give it to every source, or to none"));
        }
        if self.validation.iter().any(|source| source.weight.is_some()) {
            return Err(Error::config("validation", "weights are for training sources"));
        }
        if !(0.0..1.0).contains(&self.validation_fraction) {
            return Err(Error::config("validation_fraction", "must be in [0, 1)"));
        }
        if self.validation_fraction > 0.0 && !self.validation.is_empty() {
            return Err(Error::config("validation_fraction", "excludes `validation`"));
        }
        Ok(())
    }
}

fn yes() -> bool {
    true
}
