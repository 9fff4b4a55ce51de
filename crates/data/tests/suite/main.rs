//! The crate through its public face: files in, batches and records out.
#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod corpora;
mod datasets;
mod hub;
mod support;
mod tasks;
mod tokenizers;
