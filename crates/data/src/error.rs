//! What can go wrong between a file and a batch of tokens.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a file and a batch of tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither a folder nor a hub id.
    #[error("`{reference}` is neither a folder nor a hub id (`org/name[@revision]`)")]
    BadReference {
        /// What was given.
        reference: String,
    },
    /// The hub does not know the repository, or does not show it to us.
    #[error("the hub at {endpoint} has no {kind} `{id}` at revision `{revision}`: {why}")]
    UnknownRepository {
        /// The hub asked.
        endpoint: String,
        /// Model or dataset.
        kind: &'static str,
        /// `org/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
        /// What the hub answered.
        why: String,
    },
    /// The hub cannot be asked and the cache does not hold it.
    #[error("{kind} `{id}` at revision `{revision}` is not in the cache {} and {why}", cache.display())]
    NotCached {
        /// Model or dataset.
        kind: &'static str,
        /// `org/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
        /// The cache looked into.
        cache: PathBuf,
        /// Why the hub was not asked, or what came of it.
        why: String,
    },
    /// A file of a known repository could not be fetched.
    #[error("`{file}` of `{id}`: {why}")]
    Download {
        /// `org/name`.
        id: String,
        /// Path within the repository.
        file: String,
        /// What went wrong.
        why: String,
    },
    /// A file that a model folder must have.
    #[error("{}: there is no {file}", folder.display())]
    MissingFile {
        /// The folder.
        folder: PathBuf,
        /// What is missing.
        file: String,
    },
    /// A file that is not what it should be.
    #[error("{}: {why}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The tokenizer refused a text or an id.
    #[error("tokenizer: {why}")]
    Tokenizer {
        /// Its message.
        why: String,
    },
    /// A folder with a tokenizer in a form that we do not read.
    #[error("{}: only {found}, and no tokenizer.json", folder.display())]
    NoFastTokenizer {
        /// The folder.
        folder: PathBuf,
        /// What lies there instead.
        found: String,
    },
    /// A record of a corpus or task file.
    #[error("{}: {unit} {number}: {why}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is counted: line, row, document.
        unit: &'static str,
        /// Counted from 1.
        number: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A corpus setting that makes no sense.
    #[error("corpus setting `{key}`: {why}")]
    Config {
        /// The setting.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// No document at all.
    #[error("empty corpus: {what} holds no text")]
    EmptyCorpus {
        /// Which source or split.
        what: String,
    },
    /// Not even one sequence.
    #[error("{what}: {tokens} tokens are fewer than one sequence of {sequence_length}")]
    TooFewTokens {
        /// Which source or split.
        what: String,
        /// Tokens there.
        tokens: u64,
        /// Tokens wanted.
        sequence_length: usize,
    },
    /// A split of a task that is not where it should be.
    #[error("task data: no `{split}` split of `{repo}` ({config}): looked for {looked_for}")]
    NoSplit {
        /// Dataset repository.
        repo: String,
        /// Its configuration.
        config: String,
        /// The split.
        split: String,
        /// The places.
        looked_for: String,
    },
}

impl Error {
    /// What to do about it, where that can be said in general.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Error::BadReference { .. } => {
                "give the path of a folder, or a hub id such as `org/name` or `org/name@revision`"
            }
            Error::UnknownRepository { .. } => {
                "check the spelling and the revision; for a private or gated repository set HF_TOKEN"
            }
            Error::NotCached { .. } => {
                "download it once with a network (unset HF_HUB_OFFLINE), point HF_HOME at a cache \
                 that holds it, or give a local folder"
            }
            Error::Download { .. } => "run the command again: what has arrived is kept",
            Error::NoFastTokenizer { .. } => {
                "write one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            }
            Error::EmptyCorpus { .. } => "check the path and the name of the text field",
            Error::TooFewTokens { .. } => "use a shorter sequence_length or more text",
            Error::NoSplit { .. } => {
                "lay files out as DIR/<repository>/<config>/<split>.jsonl (or .parquet)"
            }
            _ => return None,
        })
    }

    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn bad_file(path: impl AsRef<Path>, why: impl ToString) -> Self {
        Error::BadFile { path: path.as_ref().to_path_buf(), why: why.to_string() }
    }

    pub(crate) fn config(key: impl Into<String>, why: impl ToString) -> Self {
        Error::Config { key: key.into(), why: why.to_string() }
    }
}
