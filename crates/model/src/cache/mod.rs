//! Keys and values of tokens already seen, so that what comes after costs one pass over itself.
//!
//! [`KvRows`] holds them, row by row; two books say whose they are. [`KvCache`] keeps a few
//! sequences that grow at their ends (generation), [`KvTree`] many that share beginnings
//! (evaluation).

mod rows;
mod sequences;
mod tree;

pub use rows::KvRows;
pub use sequences::KvCache;
pub use tree::{KvTree, RunId};
