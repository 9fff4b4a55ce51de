//! What can go wrong while training.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration that does not parse.
    #[error("{origin}: {message}")]
    Config {
        /// The file, or what stands for it.
        origin: String,
        /// The parser's message, with line, column and the line itself.
        message: String,
    },
    /// A configuration value that makes no sense.
    #[error("{place}: `{key}`: expected {expected}, found {found}")]
    Value {
        /// The file, with line and column where the key stands in it.
        place: String,
        /// The key, with its section.
        key: String,
        /// What it should be.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A `--set` argument that cannot be applied.
    #[error("--set {argument}: {why}")]
    Set {
        /// The argument.
        argument: String,
        /// Why not.
        why: String,
    },
    /// A pattern of `[freeze]` that does not do what it says.
    #[error("`freeze.{key}`: {why}")]
    Freeze {
        /// `train`, `freeze` or `last_layers`.
        key: &'static str,
        /// Why not.
        why: String,
    },
    /// A fresh run into a folder that already holds something.
    #[error("{} already exists and is not empty", path.display())]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// A resume from a folder that no run wrote.
    #[error("{}: not the folder of a training run: it holds files but no train.toml", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// A resume with something else than what the checkpoint was trained with.
    #[error(
        "{}: cannot resume: {what} changed: the checkpoint has {expected}, this run {found}",
        path.display()
    )]
    Changed {
        /// The checkpoint.
        path: PathBuf,
        /// What changed.
        what: &'static str,
        /// What the checkpoint was trained with.
        expected: String,
        /// What the run would use.
        found: String,
    },
    /// A checkpoint or metrics file that is not what this program writes.
    #[error("{}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The check of the first step: gradients that were not written, not finite, or zero.
    #[error("the first step's gradients are wrong, nothing was saved:\n  {}", problems.join("\n  "))]
    Gradients {
        /// One line a tensor, with its checkpoint name.
        problems: Vec<String>,
    },
    /// A loss or gradient that is no number.
    #[error("{what} at step {step} (sequences {first}..{end} of the data): {saved}")]
    NonFinite {
        /// Which quantity, with its value.
        what: String,
        /// The step, counted from 1, that was not applied.
        step: u64,
        /// First sequence of the step's batch.
        first: u64,
        /// One past its last sequence.
        end: u64,
        /// Where the last good state is.
        saved: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// From the model.
    #[error(transparent)]
    Model(Box<relufy_model::Error>),
    /// From the data.
    #[error(transparent)]
    Data(Box<relufy_data::Error>),
    /// From the arithmetic.
    #[error(transparent)]
    Ops(#[from] relufy_ops::Error),
    /// From the description of the model.
    #[error(transparent)]
    Spec(#[from] relufy_spec::Error),
    /// From the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl From<relufy_model::Error> for Error {
    fn from(error: relufy_model::Error) -> Self {
        Error::Model(Box::new(error))
    }
}

impl From<relufy_data::Error> for Error {
    fn from(error: relufy_data::Error) -> Self {
        Error::Data(Box::new(error))
    }
}

impl Error {
    /// What to do about it, where that can be said in general.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Error::OutputExists { .. } => {
                "continue the run with --resume, or set another output_dir (--set output_dir=...)"
            }
            Error::NotARun { .. } => "point output_dir at the folder of the run to resume",
            Error::Changed { .. } => {
                "resume with the configuration the run was started with (train.toml in its folder), or start a new run"
            }
            Error::Gradients { .. } => {
                "a tensor without gradient does not learn: freeze it by name, or choose a milder plan"
            }
            Error::NonFinite { .. } => {
                "resume with a lower learning_rate, a longer warm-up or a smaller max_grad_norm"
            }
            Error::Freeze { .. } => {
                "patterns match checkpoint tensor names; `*` matches any characters"
            }
            _ => return None,
        })
    }

    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn damaged(path: impl AsRef<Path>, why: impl ToString) -> Self {
        Error::Damaged { path: path.as_ref().to_path_buf(), why: why.to_string() }
    }
}
