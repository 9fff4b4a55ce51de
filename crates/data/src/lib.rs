//! Text in: the hub, tokenizers, corpora, task files. Knows no model.
//!
//! A token's way through this crate: [`hub`] finds files, [`corpus`] reads documents from
//! them, [`tokenizer`] turns these into ids, a cache keeps the ids on disk, [`packing`] cuts
//! them into sequences, [`Dataset`] mixes sources and hands out batches.
//! [`taskdata`] reads the records of evaluation tasks.

mod cache;
pub mod corpus;
mod dataset;
mod error;
pub mod hub;
pub mod packing;
mod progress;
pub mod taskdata;
pub mod tokenizer;

pub use cache::default_dir as cache_dir;
pub use corpus::{CorpusConfig, Document, Documents, SourceConfig, documents};
pub use dataset::Dataset;
pub use error::{Error, Result};
pub use hub::{Hub, HubSettings, ModelFiles, Need, Weights};
pub use packing::{Batch, IGNORE, Packed, PackingConfig};
pub use progress::{Progress, Silent};
pub use taskdata::{Record, TaskData};
pub use tokenizer::{DecodeStream, Tokenizer};
