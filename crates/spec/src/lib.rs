//! What a decoder *is*: pure data, no tensors.
//!
//! A [`DecoderSpec`] says everything that forward code needs to know about a pretrained
//! decoder, whatever its family. [`family`] reads a Hugging Face `config.json` into a
//! spec and a [`WeightMap`]; [`ReluPlan`] turns a spec into a sparser one; [`flops`]
//! counts what a token costs, [`memory`] the bytes it takes.

mod decoder;
mod error;
pub mod family;
pub mod flops;
pub mod memory;
mod plan;
mod site;
mod validate;
mod weights;

pub use decoder::{
    Activation, Attention, AttentionBias, DecoderSpec, Embedding, Head, Layer, Mlp, MlpBias,
    MlpKind, Norm, NormKind, NormPlacement, ParallelNorms, Position, Residual, RopeLayout,
    RopeScaling,
};
pub use error::{Error, Result};
pub use plan::{PerLayer, ReluPlan, Relufication, Source, Stage};
pub use site::{Site, SiteOp, SiteOps};
pub use validate::MAX_SIZE;
pub use weights::{LayerSlot, Layout, Slot, WeightMap, WeightRow};
