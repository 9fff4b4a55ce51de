//! The same operations on a GPU: bf16 or f32 in memory, f32 in every sum.
//!
//! Each file is the room of one operation and launches the kernels of `cu/` with the same name. A
//! call only queues work on the device's one stream; what returns numbers to the host waits for
//! it. Nothing adds with atomics on the way of a gradient, so a run repeats bit by bit.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod cast;
#[cfg(feature = "cudnn")]
pub(crate) mod cudnn;
pub mod decode;
pub(crate) mod embedding;
pub(crate) mod gated;
pub(crate) mod gemm;
mod gpu;
pub(crate) mod later;
mod launch;
pub(crate) mod linear;
pub(crate) mod loss;
mod lt;
mod memory;
pub(crate) mod norm;
mod operand;
pub(crate) mod pointwise;
mod profile;
mod quads;
pub(crate) mod reduce;
pub(crate) mod rope;
pub(crate) mod rows;

pub(crate) use gpu::{Gpu, Scratch, failed};
pub(crate) use launch::{Arg, Grid, Module, module};
pub(crate) use operand::{Elem, Operand, empty, empty_like, operand};
