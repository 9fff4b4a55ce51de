//! Causal attention through cuDNN, where that is faster than the own kernels: bf16 rows of q|k|v in
//! documents of one length. The library is opened at run time; `cu/cudnn.cpp` describes attention
//! to it.
//!
//! `RELUFY_ATTENTION` chooses: `own` never asks cuDNN; `cudnn` fails, with the reason, where cuDNN
//! is not used; without it, cuDNN does what it can and the own kernels do the rest.
//! `RELUFY_CUDNN_LIB` names the library's file. That it is missing is an error and not a reason to
//! be slow.

mod choice;
mod library;
mod session;
mod shape;
mod shim;

use candle_core::{DType, Tensor};

use self::choice::Choice;
use self::shape::{Refused, Shape, aligned};
use super::gpu::Gpu;
use super::operand::{empty, empty_like, operand};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::device::Cudnn;
use crate::error::{Error, Result};

const OP: &str = "attention";

/// The attention of `relufy_ops::attention::forward`; `None` where cuDNN does not apply.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing or fails; [`Error::Unsupported`] where
/// `RELUFY_ATTENTION=cudnn` asks for what cuDNN does not do.
pub(crate) fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Option<Saved>> {
    let packed = qkv.q.tensor;
    let Some(shape) = ready(packed, || Shape::of(qkv, segments, heads, false))? else {
        return Ok(None);
    };
    let rows = shape.batch * shape.len;
    let device = packed.device();
    let out = empty((rows, shape.heads * shape.head_dim), DType::BF16, device, OP)?;
    let stats = empty((shape.batch, shape.heads, shape.len), DType::F32, device, OP)?;
    let [q, k, v] = columns(packed, &shape)?;
    run(packed, &shape, &[q, k, v, operand(&out, OP)?.ptr, operand(&stats, OP)?.ptr])?;
    // Of one document, the order is the same and nothing is copied.
    let lse = stats.transpose(0, 1)?.contiguous()?.reshape((shape.heads, rows))?;
    Ok(Some(Saved { out, lse }))
}

/// The gradient of `relufy_ops::attention::backward`; `None` where cuDNN does not apply.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Option<Tensor>> {
    let packed = qkv.q.tensor;
    let shape = || {
        let types = [saved.out.dtype(), dout.dtype(), saved.lse.dtype()];
        if types != [DType::BF16, DType::BF16, DType::F32] {
            return Err("it wants outputs and their gradient in bf16, and log-sum-exps in f32");
        }
        for tensor in [&saved.out, dout] {
            aligned(tensor)?;
        }
        Shape::of(qkv, segments, heads, true)
    };
    let Some(shape) = ready(packed, shape)? else {
        return Ok(None);
    };
    // Every column of every row is written: q, k and v fill the rows and documents tile them.
    let grad = empty_like(packed, OP)?;
    let stats = saved.lse.reshape((shape.heads, shape.batch, shape.len))?;
    let stats = stats.transpose(0, 1)?.contiguous()?;
    let [q, k, v] = columns(packed, &shape)?;
    let [dq, dk, dv] = columns(&grad, &shape)?;
    let (out, dout) = (operand(&saved.out, OP)?.ptr, operand(dout, OP)?.ptr);
    run(packed, &shape, &[q, k, v, out, operand(&stats, OP)?.ptr, dout, dq, dk, dv])?;
    Ok(Some(grad))
}

/// What cuDNN did so far; opens it. `None` where `RELUFY_ATTENTION=own`.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing.
pub(crate) fn report() -> Result<Option<Cudnn>> {
    match Choice::get()? {
        Choice::Own => Ok(None),
        Choice::Auto | Choice::Cudnn => session::report().map(Some),
    }
}

/// Where q, k and v begin in packed rows.
fn columns(packed: &Tensor, shape: &Shape) -> Result<[u64; 3]> {
    let rows = operand(packed, OP)?;
    let k = shape.heads * shape.head_dim;
    Ok([rows.at(0), rows.at(k), rows.at(k + shape.kv_heads * shape.head_dim)])
}

/// The shape if cuDNN is to do it, with its plan built.
fn ready(
    packed: &Tensor,
    shape: impl FnOnce() -> std::result::Result<Shape, Refused>,
) -> Result<Option<Shape>> {
    let choice = Choice::get()?;
    let refuse = |why: &str| match choice {
        Choice::Cudnn => {
            let what = format!("cuDNN here, which RELUFY_ATTENTION demands: {why}");
            Err(Error::Unsupported { op: OP, what })
        }
        Choice::Auto | Choice::Own => Ok(None),
    };
    if choice == Choice::Own {
        return Ok(None);
    }
    let shape = match shape() {
        Ok(shape) => shape,
        Err(why) => return refuse(why),
    };
    if choice == Choice::Auto && !shape.is_worth_a_plan() {
        return Ok(None);
    }
    let gpu = Gpu::of(packed)?;
    match session::with(&gpu, |session| session.prepare(&gpu, shape))? {
        Ok(()) => Ok(Some(shape)),
        Err(why) => refuse(&why),
    }
}

/// Queues the plan of a shape that is ready.
fn run(packed: &Tensor, shape: &Shape, tensors: &[u64]) -> Result<()> {
    let gpu = Gpu::of(packed)?;
    session::with(&gpu, |session| session.run(&gpu, shape, tensors))
}
