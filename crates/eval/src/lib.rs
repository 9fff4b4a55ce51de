//! What a model can do, how sparse it is, and what a token costs: tasks, densities and
//! FLOPs, joined in the accuracy-vs-FLOPs table.
//!
//! A [`tasks::Task`] turns records of a dataset into documents; a [`Session`] answers their
//! requests with log-likelihoods, in the way and with the numbers of
//! lm-evaluation-harness; [`evaluate()`] runs a [`Suite`] of tasks and corpora into a
//! [`RunResult`], measuring densities in the same passes; [`table`] lays results side by
//! side.

mod activity;
pub mod bootstrap;
mod cache;
mod corpus;
mod error;
mod evaluate;
mod identity;
mod metrics;
mod normalize;
pub mod paired;
mod python;
mod request;
mod results;
mod session;
pub mod table;
pub mod tasks;

pub use activity::Activity;
pub use cache::{Cache, Key};
pub use corpus::{Corpus, CorpusScore};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, Inputs, Suite, evaluate};
pub use identity::identity;
pub use metrics::{Estimate, Metric, Point};
pub use request::{Compat, Encoded, Exclusion, Request, Rules, Scorable, encode};
pub use results::{
    DensityError, DensityReport, Excluded, GroupResult, ModelInfo, RunResult, Sample, Saved,
    Settings, TaskResult, TaskSamples, TokenizerInfo,
};
pub use session::{Answer, Answered, Scored, Session, SessionOptions};
