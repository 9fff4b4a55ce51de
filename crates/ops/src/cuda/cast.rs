//! Copies between f32 and bf16 on a GPU.

use candle_core::{DType, Tensor};

use super::quads::{aligned, grid};
use super::{Gpu, Module, empty, module, operand};
use crate::error::Result;

static MODULE: Module = module!("cast");

/// The same numbers, in fresh memory.
pub(crate) fn cast(t: &Tensor, dtype: DType, op: &'static str) -> Result<Tensor> {
    let to = empty(t.shape(), dtype, t.device(), op)?;
    copy_into(t, &to, op)?;
    Ok(to)
}

/// Copies the numbers of `src` to `dst`, of one shape and on one GPU.
pub(crate) fn copy_into(src: &Tensor, dst: &Tensor, op: &'static str) -> Result<()> {
    let (gpu, from, to) = (Gpu::of(src)?, operand(src, op)?, operand(dst, op)?);
    if from.elem == to.elem {
        return gpu.copy(from.ptr, to.ptr, from.byte_len(), op);
    }
    let args = [(&from).into(), (&to).into(), from.len.into(), aligned(&[&from, &to])];
    gpu.launch(op, &MODULE, "cast", Some(from.elem), grid(&from), &args)
}
