//! What can go wrong in a chain of commands.

use std::path::{Path, PathBuf};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The world's tokenizer could not be trained.
    #[error("cannot train the tokenizer: {0}")]
    Tokenizer(String),
    /// A folder that holds something else than a quickstart.
    #[error("{} holds something else than a quickstart", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A quickstart of other settings.
    #[error(
        "{}: this quickstart was begun differently: {what}: expected {expected}, found {found}",
        path.display()
    )]
    OtherSettings {
        /// The folder.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What it was begun with.
        expected: String,
        /// What is asked for now.
        found: String,
    },
    /// A record of a quickstart that this program did not write.
    #[error("{}: not the record of a quickstart: {source}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A result that lacks what the table needs.
    #[error("the results of `{model}` hold no {what}")]
    NoResult {
        /// The model.
        model: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// From training.
    #[error("{0}")]
    Trainer(#[from] relufy_trainer::Error),
    /// From evaluation.
    #[error(transparent)]
    Eval(Box<relufy_eval::Error>),
    /// From surgery.
    #[error("{0}")]
    Surgery(#[from] relufy_surgery::Error),
    /// From the model.
    #[error(transparent)]
    Model(Box<relufy_model::Error>),
    /// From the data.
    #[error("{0}")]
    Data(#[from] relufy_data::Error),
    /// A value could not be written as JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// What to do about it, where that can be said here.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Occupied { .. } => "choose another folder with -o",
            Self::OtherSettings { .. } => {
                "call it as it was begun, or choose another folder with -o"
            }
            Self::Manifest { .. } | Self::NoResult { .. } => {
                "remove the folder, or choose another one with -o"
            }
            _ => return None,
        })
    }

    /// Names the path in an I/O error.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

impl From<relufy_eval::Error> for Error {
    fn from(error: relufy_eval::Error) -> Self {
        Self::Eval(Box::new(error))
    }
}

impl From<relufy_model::Error> for Error {
    fn from(error: relufy_model::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
