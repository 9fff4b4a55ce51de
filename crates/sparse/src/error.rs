//! What can go wrong while weights are packed or tokens decoded.

use crate::Format;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while weights are packed or tokens decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model. Boxed for its size.
    #[error(transparent)]
    Model(Box<relufy_model::Error>),
    /// An operation on its parameters.
    #[error(transparent)]
    Ops(#[from] relufy_ops::Error),
    /// The system has no memory, or no thread, for the engine.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// A decoder that cannot be packed.
    #[error("the decoder cannot be packed: {0}")]
    Decoder(String),
    /// A token that the vocabulary does not have.
    #[error("token {id} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// The vocabulary's size.
        vocab: usize,
    },
    /// The cache of keys and values is full.
    #[error("{len} tokens do not fit a context of {context}")]
    ContextFull {
        /// How many there would be.
        len: usize,
        /// How many fit.
        context: usize,
    },
    /// Nothing to read.
    #[error("an empty prompt: nothing to continue")]
    EmptyPrompt,
    /// A format that has no kernels on a GPU.
    #[error("{0} weights are for the CPU; on a GPU they are f32, bf16 or int8")]
    NotOnGpus(Format),
    /// So many sequences have no kernels.
    #[error("{0} sequences at a time; a GPU takes 1, 2, 4 or 8")]
    Batch(usize),
    /// Tokens for another number of sequences.
    #[error("tokens for {found} sequences; there are {expected}")]
    Sequences {
        /// For how many.
        found: usize,
        /// How many there are.
        expected: usize,
    },
    /// A sequence that is not there, or that was named before.
    #[error("no sequence at place {place} of {sequences}, or not in ascending order")]
    Place {
        /// Where it was looked for.
        place: usize,
        /// How many there are.
        sequences: usize,
    },
    /// A format of another name.
    #[error("unknown format `{0}`; there are f32, f16, bf16 and int8")]
    UnknownFormat(String),
}

impl From<relufy_model::Error> for Error {
    fn from(error: relufy_model::Error) -> Error {
        Error::Model(Box::new(error))
    }
}
