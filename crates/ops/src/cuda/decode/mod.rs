//! Kernels of decoding: matrices times one vector or a few, where zeros are skipped.
//!
//! Activations are f32 tensors `[batch, width]` on the GPU with a batch of 1, 2, 4 or 8; what is
//! written is given by the caller, so that a token's work can be captured once as a [`Graph`] and
//! replayed. Rows of a batch share the weights that are read: the union of what each needs.
//!
//! A token is a list of operations ([`Work`]). Of one sequence they become the steps of a single
//! kernel that stays on the GPU ([`Program`]), where a GPU has it; else each is a kernel or two.
//! Those overlap: each starts while the one before ends, and reads weights before it waits for
//! the activations. Every kernel, and every step, begins with what comes before a matrix (a norm, an
//! activation, the list of what is not zero), in each of its blocks: that is cheaper than one more
//! kernel. Sums are made in a fixed order, so a run repeats bit by bit.

mod attention;
mod graph;
mod input;
mod launch;
mod matrix;
mod pairs;
mod program;
mod project;
mod room;
mod rows;
mod token;
mod words;
mod work;

pub use attention::{Attention, AttentionPlan, KvCache, attend};
pub use graph::Graph;
pub use input::{COUNTS, Input, Norm};
pub use launch::set_overlap;
pub use matrix::{Format, GpuMatrix, read_bandwidth};
pub use pairs::{PairsByInput, pairs_by_input};
pub use program::Program;
pub use project::{
    Output, Tiles, gate_and_up, project_by_input, project_by_input_in, project_by_output,
};
pub use room::Room;
pub use rows::{UpRows, up_rows};
pub use token::{Embedding, advance, argmax, embed};
pub use words::Words;
pub use work::Work;

use candle_core::Tensor;

use super::{Elem, operand};
use crate::buffer::{dims2, no_kernel};
use crate::error::{Error, Result};

/// Batches that there are kernels for.
pub const BATCHES: [usize; 4] = [1, 2, 4, 8];

/// Demands a batch that there are kernels for.
fn ensure_batch(batch: usize, op: &'static str) -> Result<()> {
    if BATCHES.contains(&batch) {
        return Ok(());
    }
    let what = format!("a batch of {batch}; there are kernels for 1, 2, 4 and 8 rows");
    Err(Error::Unsupported { op, what })
}

/// The address of a contiguous f32 tensor on the GPU with so many elements.
fn numbers(t: &Tensor, len: usize, name: &'static str, op: &'static str) -> Result<u64> {
    let found = operand(t, op)?;
    if found.elem != Elem::F32 {
        return Err(no_kernel(t, op));
    }
    if found.len != len {
        let (expected, found) = (vec![len], t.dims().to_vec());
        return Err(Error::Shape { op, tensor: name, expected, found });
    }
    Ok(found.ptr)
}

/// The same, or 0 where there is none.
fn numbers_or_null(
    t: Option<&Tensor>,
    len: usize,
    name: &'static str,
    op: &'static str,
) -> Result<u64> {
    t.map_or(Ok(0), |t| numbers(t, len, name, op))
}

/// The address and shape of f32 activations `[batch, width]`.
fn activations(t: &Tensor, name: &'static str, op: &'static str) -> Result<(u64, usize, usize)> {
    let (batch, width) = dims2(t, op, name)?;
    ensure_batch(batch, op)?;
    Ok((numbers(t, batch * width, name, op)?, batch, width))
}
