//! What can be wrong with a config or a plan.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a config or a plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No family of that `model_type`.
    #[error("unknown architecture: model_type `{model_type}`")]
    UnknownArchitecture {
        /// What the config says.
        model_type: String,
    },
    /// A key that the family needs.
    #[error("config key `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key that nobody consumed and that is not on the family's ignore list.
    #[error("config keys nobody understands: {}", keys.join(", "))]
    UnknownKeys {
        /// The keys.
        keys: Vec<String>,
    },
    /// A value of the wrong type, or one that makes no sense.
    #[error("config key `{key}`: expected {expected}, found {found}")]
    BadValue {
        /// The key.
        key: String,
        /// What it should be.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A known architecture with something that is not supported.
    #[error("not supported: {what}")]
    Unsupported {
        /// What, by name.
        what: String,
    },
    /// A decoder that cannot be.
    #[error("decoder: {why}")]
    Spec {
        /// Why not.
        why: String,
    },
    /// A plan that does not fit the decoder.
    #[error("plan: {why}")]
    Plan {
        /// Why not.
        why: String,
    },
}
