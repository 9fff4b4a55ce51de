//! What a model can do, how sparse it is, and what a token costs: tasks, densities and
//! FLOPs, joined in the accuracy-vs-FLOPs table.
//!
//! A [`tasks::Task`] turns records of a dataset into documents; a [`Session`] answers their
//! requests with log-likelihoods, in the way and with the numbers of
//! lm-evaluation-harness; [`evaluate()`] runs a [`Suite`] of tasks and corpora into a
//! [`RunResult`], measuring densities in the same passes; [`table`] lays results side by
//! side.

pub mod bootstrap;
mod corpus;
mod error;
mod evaluate;
mod metrics;
mod request;
mod results;
mod session;
pub mod table;
pub mod tasks;

pub use corpus::{Corpus, CorpusScore};
pub use error::{Error, Result};
pub use evaluate::{Inputs, Judged, Suite, documents, evaluate, judge};
pub use metrics::{Estimate, Metric};
pub use request::{Encoded, Exclusion, Request, encode};
pub use results::{DensityReport, Excluded, FILE, ModelInfo, RunResult, TaskResult};
pub use session::{Scored, Session, SessionOptions};
