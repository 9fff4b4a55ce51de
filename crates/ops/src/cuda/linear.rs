//! Linear layers: products through cuBLAS, and the sums for the gradient of a bias.

use std::ops::Range;

use candle_core::Tensor;

use super::gemm::{Mat, gemm};
use super::lt::{self, Epilogue};
use super::{Arg, Gpu, Grid, Module, Operand, empty, module, operand};
use crate::buffer::{Accum, Dest, no_kernel};
use crate::error::Result;

static MODULE: Module = module!("linear");

/// `y = x W^T (+ b)`; shapes are checked.
pub(crate) fn forward(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    sizes: (usize, usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let epilogue = if bias.is_some() { Epilogue::Bias } else { Epilogue::Plain };
    product((x, w, bias), epilogue, None, sizes, op)
}

/// `y = residual + x W^T (+ b)`; shapes are checked.
pub(crate) fn forward_onto(
    residual: &Tensor,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    sizes: (usize, usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let epilogue = if bias.is_some() { Epilogue::Bias } else { Epilogue::Plain };
    product((x, w, bias), epilogue, Some(residual), sizes, op)
}

/// `y = max(x W^T + b, 0)`; shapes are checked.
pub(crate) fn forward_relu(
    x: &Tensor,
    w: &Tensor,
    bias: &Tensor,
    sizes: (usize, usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    product((x, w, Some(bias)), Epilogue::BiasRelu, None, sizes, op)
}

fn product(
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    epilogue: Epilogue,
    residual: Option<&Tensor>,
    (n, inputs, outputs): (usize, usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let gpu = Gpu::of(x)?;
    let y = empty((n, outputs), x.dtype(), x.device(), op)?;
    let (x_at, w_at, y_at) = (operand(x, op)?, operand(w, op)?, operand(&y, op)?);
    let w_mat = Mat::new(&w_at.like(&x_at, w, op)?, outputs, inputs);
    let (x_mat, y_mat) = (Mat::new(&x_at, n, inputs), Mat::new(&y_at, n, outputs));
    if epilogue == Epilogue::Plain && residual.is_none() {
        gemm(&gpu, op, 1.0, x_mat, w_mat.t(), y_mat, Accum::Overwrite)?;
        return Ok(y);
    }
    let like_x = |t: &Tensor| operand(t, op)?.like(&x_at, t, op);
    let (bias, residual) = (bias.map(like_x).transpose()?, residual.map(like_x).transpose()?);
    let mats = (x_mat, w_mat, y_mat);
    lt::linear(&gpu, op, mats, bias.as_ref(), epilogue, residual.as_ref())?;
    Ok(y)
}

/// `dx (+)= dy W`; shapes are checked.
pub(crate) fn backward_input(
    dy: &Tensor,
    w: &Tensor,
    dx: Option<Dest<'_>>,
    (n, inputs, outputs): (usize, usize, usize),
    op: &'static str,
) -> Result<Tensor> {
    let gpu = Gpu::of(dy)?;
    let (dx, accum) = match dx {
        Some((dx, accum)) => (dx.clone(), accum),
        None => (empty((n, inputs), dy.dtype(), dy.device(), op)?, Accum::Overwrite),
    };
    let (dy_at, w_at, dx_at) = (operand(dy, op)?, operand(w, op)?, operand(&dx, op)?);
    let w_mat = Mat::new(&w_at.like(&dy_at, w, op)?, outputs, inputs);
    let (dy_mat, dx_mat) = (Mat::new(&dy_at, n, outputs), Mat::new(&dx_at, n, inputs));
    zero_if_empty(&gpu, outputs, &dx_at, accum, op)?;
    gemm(&gpu, op, 1.0, dy_mat, w_mat, dx_mat, accum)?;
    Ok(dx)
}

/// `dW[rows] (+)= dy[:, rows]^T x`; shapes are checked.
pub(crate) fn backward_weight(
    dy: &Tensor,
    x: &Tensor,
    rows: Range<usize>,
    (dw, accum): Dest<'_>,
    (n, inputs, outputs): (usize, usize, usize),
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(dy)?;
    let (dy_at, dw_at) = (operand(dy, op)?, operand(dw, op)?);
    let x_at = operand(x, op)?.like(&dy_at, x, op)?;
    if n == 0 {
        if accum == Accum::Overwrite {
            let bytes = rows.len() * inputs * dw_at.elem.bytes();
            gpu.zero(dw_at.at(rows.start * inputs), bytes, op)?;
        }
        return Ok(());
    }
    let dy_mat = Mat::at(&dy_at, rows.start, n, rows.len(), outputs);
    let dw_mat = Mat::at(&dw_at, rows.start * inputs, rows.len(), inputs, inputs);
    gemm(&gpu, op, 1.0, dy_mat.t(), Mat::new(&x_at, n, inputs), dw_mat, accum)
}

/// `db[rows] (+)=` the sums of the columns `rows` of `dy`; shapes are checked.
pub(crate) fn backward_bias(
    dy: &Tensor,
    rows: Range<usize>,
    (db, accum): Dest<'_>,
    (n, outputs): (usize, usize),
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(dy)?;
    let (dy, db_at) = (operand(dy, op)?, operand(db, op)?);
    if db_at.len < rows.end {
        return Err(no_kernel(db, op));
    }
    let to = Operand { ptr: db_at.at(rows.start), len: rows.len(), ..db_at };
    column_sums(&gpu, &dy, (n, outputs), rows, (&to, accum), op)
}

/// `to (+)=` the sums of some columns of a matrix of (rows, stride).
pub(crate) fn column_sums(
    gpu: &Gpu,
    matrix: &Operand,
    (n, stride): (usize, usize),
    columns: Range<usize>,
    (to, accum): (&Operand, Accum),
    op: &'static str,
) -> Result<()> {
    /// Columns of a block.
    const WIDE: usize = 64;
    let (first, count) = (columns.start, columns.len());
    let across = count.div_ceil(WIDE);
    // About four blocks a processor, of at least 64 rows each.
    let down = (4 * gpu.processors as usize).div_ceil(across.max(1)).min(n.div_ceil(64)).max(1);
    let rows_per_block = n.div_ceil(down).max(1);
    let partial = gpu.scratch(down * count * size_of::<f32>(), op)?;
    let grid = Grid { blocks: (across as u32, down as u32, 1), threads: 256, shared_bytes: 0 };
    let args: [Arg; 7] = [
        matrix.into(),
        n.into(),
        stride.into(),
        first.into(),
        count.into(),
        rows_per_block.into(),
        partial.ptr.into(),
    ];
    gpu.launch(op, &MODULE, "column_partials", Some(matrix.elem), grid, &args)?;
    let add = i32::from(accum == Accum::Add);
    let args = [partial.ptr.into(), (down as i32).into(), count.into(), to.into(), add.into()];
    gpu.launch(op, &MODULE, "add_partials", Some(to.elem), Grid::over(count, 128), &args)
}

/// A product over no inner dimension is 0, which cuBLAS need not write.
fn zero_if_empty(
    gpu: &Gpu,
    inner: usize,
    to: &Operand,
    accum: Accum,
    op: &'static str,
) -> Result<()> {
    match (inner, accum) {
        (0, Accum::Overwrite) => gpu.zero(to.ptr, to.byte_len(), op),
        _ => Ok(()),
    }
}
