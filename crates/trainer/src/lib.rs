//! Fine-tunes and pretrains a decoder on text.
//!
//! [`TrainConfig`] is a run as one file; [`Trainer::prepare`] reads and checks everything
//! it names, [`Trainer::plan`] says what it will take, [`Trainer::run`] trains and reports
//! to an [`Observer`]. The model computes its own gradients; here they become steps:
//! accumulation weighted by tokens, clipping, AdamW, schedules, metrics, validation, and
//! checkpoints from which a run continues bit for bit.

pub mod bench;
pub mod config;
mod error;
mod folder;
mod freeze;
#[cfg(test)]
mod golden_test;
mod init;
mod machine;
mod metrics;
mod observer;
mod optimizer;
mod pieces;
mod plan;
mod prepare;
mod record;
mod schedule;
mod snapshot;
mod state;
mod step;
mod tensorboard;
mod trainer;
mod validation;

pub use config::TrainConfig;
pub use error::{Error, Result};
pub use init::{InitOptions, Initialised, init};
pub use observer::{Observer, StepReport, Unobserved, Validation};
pub use plan::Plan;
pub use prepare::Surroundings;
pub use schedule::{Schedule, l1_factor, prosparse};
pub use snapshot::completed;
pub use state::TrainerState;
pub use trainer::{Summary, Trainer};
