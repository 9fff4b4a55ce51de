//! The crate through its public face: files in, batches and records out.
#![allow(clippy::unwrap_used, reason = "helpers of tests may panic")]
#![allow(clippy::single_range_in_vec_init, reason = "one masked range is what is meant")]

mod corpora;
mod datasets;
mod hub;
mod support;
mod tasks;
mod tokenizers;
