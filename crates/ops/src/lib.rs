//! The arithmetic of a decoder: each operation with its forward and its backward side by side.
//!
//! Operations take and give candle tensors; activations are `[n_tokens, width]`, contiguous. They
//! look at the device: f32 on the CPU is implemented, anything else is [`Error::NoKernel`]. The
//! arithmetic itself works on slices, in private functions.
//!
//! Gradients are written by hand: nothing here uses candle's autograd, which serves as the oracle in
//! the tests. Results do not depend on the number of rayon threads: work is cut into chunks of fixed
//! size and sums are added in a fixed order. `relu'(0) = 0`, as in PyTorch.

pub mod adamw;
pub mod attention;
pub mod buffer;
#[cfg(feature = "cuda")]
mod cuda;
mod curve;
pub mod device;
pub mod embedding;
pub mod error;
pub mod gated;
pub mod gemm;
mod gemv;
pub mod linear;
pub mod loss;
mod math;
pub mod norm;
mod norm_heads;
mod norm_rows;
mod par;
pub mod pointwise;
pub mod reduce;
pub mod rope;
pub mod rows;
mod scratch;
mod vmath;

pub use buffer::{Accum, Dest};
#[cfg(feature = "cuda")]
pub use cuda::decode;
pub use error::{Error, Result};
