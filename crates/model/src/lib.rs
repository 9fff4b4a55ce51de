//! The one decoder: its walk over the layers, its activation sites, its files on disk.
//!
//! [`Checkpoint`] opens a Hugging Face folder; [`Checkpoint::load`] makes a [`Decoder`] of
//! it. The decoder's walk serves training, evaluation and decoding alike; a [`Tap`] sees
//! activations on the way without changing it.

mod block;
mod cache;
pub mod checkpoint;
mod decoder;
mod error;
pub mod export;
mod generate;
mod generate_batch;
mod gradients;
pub mod layer;
mod params;
mod precision;
mod probe;
mod step;
mod tap;
mod tokens;

pub use cache::{KvCache, KvRows, KvTree, RunId};
pub use checkpoint::{Checkpoint, StoredDtype};
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use generate::{generate, next_logits};
pub use generate_batch::{Listener, Prompt, Room, generate_batch};
pub use gradients::{Buffers, Gradients, Trainable};
pub use params::{Init, LayerParam, Masters, Param, ParamId, Params, Part};
pub use precision::Precision;
pub use probe::{Probe, probe};
pub use relufy_ops::attention::{Run, Segment};
pub use relufy_ops::loss::{IGNORE, TokenScore};
pub use step::{Objective, OnFinal, Recompute, StepLoss, TeacherOutput};
pub use tap::{DensityTap, NoTap, Point, Side, Tap, Want};
pub use tokens::Tokens;
