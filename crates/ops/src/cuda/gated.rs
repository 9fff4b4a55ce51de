//! The gated MLP's middle on a GPU.

use candle_core::Tensor;

use super::pointwise::curve_name;
use super::{Arg, Gpu, Grid, Module, Operand, empty, empty_like, module, operand};
use crate::error::{Error, Result};
use crate::pointwise::Pointwise;

static MODULE: Module = module!("gated");

const THREADS: u32 = 256;
/// Elements of a block's partial sum of `|h|`, as in `cu/gated.cu`.
const CHUNK: usize = 16384;

/// `f(gate) * up` of `gu` `[n, 2 ffn]`.
pub(crate) fn forward(
    gu: &Tensor,
    f: Pointwise,
    size: (usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let (gpu, h) = (Gpu::of(gu)?, empty(size, gu.dtype(), gu.device(), op)?);
    let (wide, to) = (operand(gu, op)?, operand(&h, op)?);
    launch(&gpu, "forward", f, &[&wide, &to], size, op)?;
    Ok(h)
}

/// The gradient of `gu`; the shapes are checked.
pub(crate) fn backward(
    gu: &Tensor,
    f: Pointwise,
    dh: &Tensor,
    size: (usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let (gpu, dgu) = (Gpu::of(gu)?, empty_like(gu, op)?);
    let wide = operand(gu, op)?;
    let from = operand(dh, op)?.like(&wide, dh, op)?;
    launch(&gpu, "backward", f, &[&wide, &from, &operand(&dgu, op)?], size, op)?;
    Ok(dgu)
}

/// The gradient of `gu`, and `h` again; the shapes are checked.
pub(crate) fn backward_with_output(
    gu: &Tensor,
    f: Pointwise,
    dh: &Tensor,
    size: (usize, usize),
    op: &'static str,
) -> Result<(Tensor, Tensor)> {
    let (gpu, dgu, h) = (Gpu::of(gu)?, empty_like(gu, op)?, empty_like(dh, op)?);
    let wide = operand(gu, op)?;
    let from = operand(dh, op)?.like(&wide, dh, op)?;
    let operands = [&wide, &from, &operand(&dgu, op)?, &operand(&h, op)?];
    launch(&gpu, "backward_output", f, &operands, size, op)?;
    Ok((dgu, h))
}

/// Adds `lambda sign(h)` to `dh` and returns the sum of `|h|`; the shapes are checked.
pub(crate) fn add_l1_gradient(
    h: &Tensor,
    lambda: f32,
    dh: &Tensor,
    op: &'static str,
) -> Result<f64> {
    let (gpu, from) = (Gpu::of(h)?, operand(h, op)?);
    let to = operand(dh, op)?.like(&from, dh, op)?;
    let blocks = from.len.div_ceil(CHUNK);
    let sums = gpu.scratch(blocks * size_of::<f64>(), op)?;
    let aligned = from.vectorises(0) && to.vectorises(0);
    gpu.launch(
        op,
        &MODULE,
        "add_l1",
        Some(from.elem),
        Grid::new(blocks, THREADS),
        &[
            (&from).into(),
            (&to).into(),
            sums.ptr.into(),
            from.len.into(),
            lambda.into(),
            i32::from(aligned).into(),
        ],
    )?;
    Ok(gpu.download::<f64>(sums.ptr, blocks, op)?.iter().sum())
}

/// Launches a kernel over the `n x ffn` elements of `h`.
fn launch(
    gpu: &Gpu,
    name: &str,
    f: Pointwise,
    operands: &[&Operand],
    (n, ffn): (usize, usize),
    op: &'static str,
) -> Result<()> {
    let Some(&first) = operands.first() else { return Ok(()) };
    let width = i32::try_from(ffn).map_err(|_| {
        let what = format!("a width of {ffn}");
        Error::Unsupported { op, what }
    })?;
    let aligned = operands.iter().all(|operand| operand.vectorises(ffn));
    let per_row = ffn / if aligned { first.elem.per_vector() } else { 1 };
    let (curve, parameter) = curve_name(f);
    let mut args: Vec<Arg> = operands.iter().map(|&operand| operand.into()).collect();
    args.extend([
        Arg::from(n),
        width.into(),
        per_row.into(),
        i32::from(aligned).into(),
        parameter.into(),
    ]);
    let grid = Grid::over(n * per_row, THREADS);
    gpu.launch(op, &MODULE, &format!("{name}_{curve}"), Some(first.elem), grid, &args)
}
