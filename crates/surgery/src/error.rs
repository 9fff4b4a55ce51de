//! What can go wrong in surgery and calibration.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in surgery and calibration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request that contradicts itself or does not fit the model.
    #[error("surgery: {why}")]
    Request {
        /// What does not fit what.
        why: String,
    },
    /// Nothing to measure on.
    #[error("{corpus}: no text of at least two tokens to calibrate on")]
    NoText {
        /// The corpus.
        corpus: String,
    },
    /// A value of the calibration that cannot be.
    #[error("calibration: {why}")]
    Calibration {
        /// What, and what it should be.
        why: String,
    },
    /// The checkpoint, its decoder or the output folder.
    #[error(transparent)]
    Model(Box<relufy_model::Error>),
    /// The plan does not fit the model.
    #[error(transparent)]
    Spec(#[from] relufy_spec::Error),
    /// The corpus or the tokenizer.
    #[error(transparent)]
    Data(#[from] relufy_data::Error),
}

impl From<relufy_model::Error> for Error {
    fn from(error: relufy_model::Error) -> Error {
        Error::Model(Box::new(error))
    }
}
