//! Activation functions on a GPU.

use candle_core::Tensor;

use super::{Arg, Gpu, Grid, Module, Operand, empty_like, module, operand};
use crate::error::Result;
use crate::pointwise::Pointwise;

static MODULE: Module = module!("pointwise");

const THREADS: u32 = 256;
/// Bytes of a tensor that a block has, as in `cu/pointwise.cu`.
const TILE: usize = THREADS as usize * 2 * 16;

/// `f(x)`.
pub(crate) fn forward(x: &Tensor, f: Pointwise, op: &'static str) -> Result<Tensor> {
    let (gpu, y) = (Gpu::of(x)?, empty_like(x, op)?);
    let (from, to) = (operand(x, op)?, operand(&y, op)?);
    let (name, parameter) = curve_name(f);
    gpu.launch(
        op,
        &MODULE,
        &format!("forward_{name}"),
        Some(from.elem),
        grid(&from),
        &[(&from).into(), (&to).into(), from.len.into(), aligned(&[&from, &to]), parameter.into()],
    )?;
    Ok(y)
}

/// `f'(x) dy` into `dx`, which may be `dy`; the shapes are checked.
pub(crate) fn backward(
    x: &Tensor,
    f: Pointwise,
    dy: &Tensor,
    dx: &Tensor,
    op: &'static str,
) -> Result<()> {
    let (gpu, x) = (Gpu::of(x)?, operand(x, op)?);
    let (from, to) = (operand(dy, op)?.like(&x, dy, op)?, operand(dx, op)?.like(&x, dx, op)?);
    let (name, parameter) = curve_name(f);
    gpu.launch(
        op,
        &MODULE,
        &format!("backward_{name}"),
        Some(x.elem),
        grid(&x),
        &[
            (&x).into(),
            (&from).into(),
            (&to).into(),
            x.len.into(),
            aligned(&[&x, &from, &to]),
            parameter.into(),
        ],
    )
}

fn grid(x: &Operand) -> Grid {
    Grid::new(x.byte_len().div_ceil(TILE), THREADS)
}

/// Whether all begin where vectors may, as an argument.
fn aligned(operands: &[&Operand]) -> Arg {
    i32::from(operands.iter().all(|operand| operand.vectorises(0))).into()
}

/// The name that entry points have for a curve, and the curve's parameter (0 where it has none).
pub(crate) fn curve_name(f: Pointwise) -> (&'static str, f32) {
    match f {
        Pointwise::Identity => ("identity", 0.0),
        Pointwise::Silu => ("silu", 0.0),
        Pointwise::Gelu => ("gelu", 0.0),
        Pointwise::GeluTanh => ("gelu_tanh", 0.0),
        Pointwise::Swish { beta } => ("swish", beta),
        Pointwise::Relu => ("relu", 0.0),
        Pointwise::ShiftedRelu { shift } => ("shifted_relu", shift),
        Pointwise::FatRelu { threshold } => ("fat_relu", threshold),
    }
}

/// The number that kernels' `AnyCurve` has for a curve, and the curve's parameter.
pub(crate) fn curve_code(f: Pointwise) -> (i32, f32) {
    let code = match f {
        Pointwise::Identity => 0,
        Pointwise::Silu => 1,
        Pointwise::Gelu => 2,
        Pointwise::GeluTanh => 3,
        Pointwise::Swish { .. } => 4,
        Pointwise::Relu => 5,
        Pointwise::ShiftedRelu { .. } => 6,
        Pointwise::FatRelu { .. } => 7,
    };
    (code, curve_name(f).1)
}
