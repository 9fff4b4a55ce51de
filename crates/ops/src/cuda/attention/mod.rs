//! Attention: through cuDNN where it is built in and applies; else on the tensor cores in bf16 for
//! the usual head sizes, and in plain f32 arithmetic for the rest.
//!
//! A pass is a [`Problem`](problem::Problem), cut into tiles by [`plan`], and queued by
//! [`forward`](mod@forward) or [`backward`](mod@backward) with the kernels that
//! [`kernels`] knows for its heads.

mod backward;
mod forward;
mod kernels;
mod plan;
mod prefix;
mod problem;

use candle_core::Tensor;

use super::{Module, module};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::error::Result;

const OP: &str = "attention";

static FORWARD: Module = module!("attention_forward");
static BACKWARD: Module = module!("attention_backward");
static EXACT: Module = module!("attention_exact");

/// Checked by the caller.
pub(crate) fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Saved> {
    #[cfg(feature = "cudnn")]
    if let Some(saved) = super::cudnn::forward(qkv, segments, heads)? {
        return Ok(saved);
    }
    forward::forward(qkv, segments, heads)
}

/// Checked by the caller.
pub(crate) fn backward(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Tensor> {
    #[cfg(feature = "cudnn")]
    if let Some(grad) = super::cudnn::backward(qkv, segments, heads, saved, dout)? {
        return Ok(grad);
    }
    backward::backward(qkv, segments, heads, saved, dout)
}
