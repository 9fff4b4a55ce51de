//! What can go wrong while a model is evaluated or a table is made.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while a model is evaluated or a table is made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model. Boxed: it is several times the size of any other.
    #[error(transparent)]
    Model(Box<relufy_model::Error>),
    /// Task data, a corpus or the tokenizer. Boxed for its size, too.
    #[error(transparent)]
    Data(Box<relufy_data::Error>),
    /// A config, or FLOPs of a spec.
    #[error(transparent)]
    Spec(#[from] relufy_spec::Error),
    /// No task of that name.
    #[error("unknown task `{name}`; {known}")]
    UnknownTask {
        /// What was asked for.
        name: String,
        /// The names that resemble it, or those that exist.
        known: String,
    },
    /// The records of a task.
    #[error("task `{task}`: {source}")]
    TaskData {
        /// The task.
        task: String,
        /// What is wrong with them. Boxed, as the model's.
        source: Box<relufy_data::Error>,
    },
    /// More examples than there are records.
    #[error("task `{task}`: {wanted} examples are to be taken, but {source_name} has {found}")]
    TooFewExamples {
        /// The task.
        task: String,
        /// The file they would come from.
        source_name: String,
        /// How many are drawn: one more than are shown where the record asked may be among
        /// them.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// Two tasks or corpora that would share a name in results.
    #[error("`{name}` is asked for twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A record without what the task needs.
    #[error("task `{task}`, {source_name}, record {record}: {why}")]
    Record {
        /// The task.
        task: String,
        /// The file or dataset split.
        source_name: String,
        /// Number of the record, from 1.
        record: usize,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing to evaluate.
    #[error("`{name}` ({source_name}): {why}")]
    Empty {
        /// The task or corpus.
        name: String,
        /// The file or dataset split.
        source_name: String,
        /// Why nothing is left.
        why: String,
    },
    /// A setting that makes no sense.
    #[error("{what}: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A log-likelihood that is no number.
    #[error("the model gave {found} as log-probability of token {token} (request {request})")]
    NotFinite {
        /// The value.
        found: f32,
        /// The continuation token.
        token: u32,
        /// Index of the request, in the order given.
        request: usize,
    },
    /// The file of kept answers.
    #[error("the cache {}: {why}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A folder that cannot be made.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that is no result of an evaluation.
    #[error("{} is no evaluation result: {source}", path.display())]
    Results {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A folder without a result.
    #[error("{} holds no results_*.json", path.display())]
    NoResults {
        /// The folder.
        path: PathBuf,
    },
    /// A line of a file of samples that is none.
    #[error("{}: line {line}: {why}", path.display())]
    Sample {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// Two results that cannot be compared document by document.
    #[error("`{task}` of {run} and of {baseline} cannot be compared: {why}")]
    Unpaired {
        /// The task.
        task: String,
        /// A run's name.
        run: String,
        /// The baseline's name.
        baseline: String,
        /// Why not.
        why: String,
    },
    /// A result that cannot be written as JSON.
    #[error("cannot write the result: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<relufy_data::Error> for Error {
    fn from(error: relufy_data::Error) -> Error {
        Error::Data(Box::new(error))
    }
}

impl From<relufy_model::Error> for Error {
    fn from(error: relufy_model::Error) -> Error {
        Error::Model(Box::new(error))
    }
}
