//! What can go wrong between a folder and a running decoder.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a folder and a running decoder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is no JSON, or not the JSON it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Position and reason.
        source: serde_json::Error,
    },
    /// The config describes nothing that can be run.
    #[error("{}: {source}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// Why.
        source: relufy_spec::Error,
    },
    /// A plan or a spec that does not fit.
    #[error(transparent)]
    Spec(#[from] relufy_spec::Error),
    /// The folder holds no model.
    #[error("{}: {what}", path.display())]
    NotAModel {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// A weight file that is damaged or lies about itself.
    #[error("{}: damaged weight file: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not add up.
        why: String,
    },
    /// A tensor that the architecture needs and no file holds.
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// Its name in the checkpoint.
        tensor: String,
    },
    /// Tensors that the architecture has no place for.
    #[error("{}: tensors that the architecture has no place for: {}", path.display(), tensors.join(", "))]
    ExtraTensors {
        /// The checkpoint.
        path: PathBuf,
        /// Their names.
        tensors: Vec<String>,
    },
    /// A tensor of the wrong shape.
    #[error("{}: tensor `{tensor}`: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the config implies.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// A tensor of a type that weights cannot have.
    #[error("{}: tensor `{tensor}`: expected f32, f16 or bf16, found {found}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A weight that is NaN or infinite.
    #[error("{}: tensor `{tensor}` holds {value} at element {element}", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index of the first such element, in the stored order.
        element: usize,
        /// The value.
        value: f32,
    },
    /// A head stored beside the embedding it should be tied to, with other values.
    #[error("{}: `{first}` and `{second}` are tied by the config, but their values differ", path.display())]
    TiedDiffer {
        /// The checkpoint.
        path: PathBuf,
        /// The embedding.
        first: String,
        /// The head.
        second: String,
    },
    /// A tokenizer with ids that the embedding has no row for.
    #[error("{}: the tokenizer has {tokens} tokens, the embedding {rows} rows", path.display())]
    TokenizerTooLarge {
        /// The checkpoint.
        path: PathBuf,
        /// One more than the tokenizer's largest id.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Where output should go something stands already.
    #[error("{} exists already", path.display())]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// A sequence with more positions than the model was made for.
    #[error("a sequence of {len} tokens is longer than the model's {max} positions")]
    SequenceTooLong {
        /// Its length.
        len: usize,
        /// The model's limit.
        max: usize,
    },
    /// More tokens than a cache has rows for.
    #[error("no room for {wanted} more tokens: {used} of the cache's {rows} rows are in use")]
    CacheFull {
        /// Tokens that were to be added.
        wanted: usize,
        /// Rows that hold tokens.
        used: usize,
        /// All rows.
        rows: usize,
    },
    /// A token id without an embedding.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A call whose arguments do not fit one another.
    #[error("{0}")]
    Invalid(String),
    /// A model that cannot be handed on to others.
    #[error("no export: {why}")]
    Export {
        /// Why.
        why: String,
    },
    /// No tensor of that name.
    #[error("the checkpoint has no tensor `{0}`")]
    NoSuchTensor(String),
    /// The arithmetic failed.
    #[error(transparent)]
    Ops(#[from] relufy_ops::Error),
    /// The tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Tokenizer or hub.
    #[error(transparent)]
    Data(Box<relufy_data::Error>),
}

impl From<relufy_data::Error> for Error {
    fn from(error: relufy_data::Error) -> Error {
        Error::Data(Box::new(error))
    }
}

impl Error {
    /// An I/O error with its path.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }
}
