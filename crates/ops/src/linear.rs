//! The linear layer: `y = x W^T + b` with `W` stored `[out, in]`, as checkpoints hold it.
//!
//! Backward, with `dy` the gradient of `y`: `dx = dy W`, `dW = dy^T x`, `db` = the column sums of `dy`.

use std::ops::Range;

use candle_core::Tensor;
use multiversion::multiversion;

use crate::buffer::{
    Accum, Dest, dims2, ensure_distinct, ensure_range, ensure_shape, fill_vec, from_vec, view,
    write_f32,
};
use crate::error::Result;
use crate::gemm::{MatMut, MatRef, Threads, gemm};
use crate::gemv::gemv;
use crate::par::{for_chunks, grain};
use crate::pointwise::{self, Pointwise};
use crate::reduce;

/// `y = x W^T (+ b)`: `x` `[n, in]`, `w` `[out, in]`, `bias` `[out]`, `y` `[n, out]`.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Rank`], [`crate::Error::NoKernel`],
/// [`crate::Error::NotContiguous`].
pub fn forward(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (n, inputs) = dims2(x, OP, "x")?;
    let (outputs, _) = dims2(w, OP, "w")?;
    ensure_shape(w, OP, "w", &[outputs, inputs])?;
    if let Some(bias) = bias {
        ensure_shape(bias, OP, "bias", &[outputs])?;
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::linear::forward(x, w, bias, (n, inputs, outputs), OP);
    }
    let (x_data, w_data) = (view(x, OP)?, view(w, OP)?);
    let bias = bias.map(|bias| view(bias, OP)).transpose()?;
    let bias = bias.as_deref();
    let y = if n == 1 {
        // SAFETY: `gemv` writes each element.
        unsafe { fill_vec(outputs, |y| gemv(&w_data, &x_data, bias.unwrap_or(&[]), y)) }
    } else if let Some(bias) = bias {
        let mut y = repeat_row(bias, n);
        let y_mat = MatMut::new(&mut y, n, outputs, Accum::Add)?;
        let (x_mat, w_mat) =
            (MatRef::new(&x_data, n, inputs)?, MatRef::new(&w_data, outputs, inputs)?);
        gemm(1.0, x_mat, w_mat.t(), y_mat, Threads::All)?;
        y
    } else {
        product(
            MatRef::new(&x_data, n, inputs)?,
            MatRef::new(&w_data, outputs, inputs)?.t(),
            n,
            outputs,
        )?
    };
    from_vec(y, (n, outputs), x.device())
}

/// `residual + x W^T (+ b)`, `residual` `[n, out]`: a projection back to the residual stream, in one
/// pass over the output on a GPU.
///
/// # Errors
/// As [`forward`].
pub fn forward_onto(
    residual: &Tensor,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        const OP: &str = "linear onto";
        let ((n, inputs), (outputs, _)) = (dims2(x, OP, "x")?, dims2(w, OP, "w")?);
        ensure_shape(w, OP, "w", &[outputs, inputs])?;
        ensure_shape(residual, OP, "residual", &[n, outputs])?;
        if let Some(bias) = bias {
            ensure_shape(bias, OP, "bias", &[outputs])?;
        }
        let sizes = (n, inputs, outputs);
        return crate::cuda::linear::forward_onto(residual, x, w, bias, sizes, OP);
    }
    let y = forward(x, w, bias)?;
    reduce::add_in_place(&y, residual)?;
    Ok(y)
}

/// `max(x W^T + b, 0)`: the up projection of an MLP whose activation is ReLU, in one pass over the
/// output where a bias is there on a GPU. Its gradient's mask is that the output is positive.
///
/// # Errors
/// As [`forward`].
pub fn forward_relu(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (true, Some(bias)) = (x.device().is_cuda(), bias) {
        const OP: &str = "linear with ReLU";
        let ((n, inputs), (outputs, _)) = (dims2(x, OP, "x")?, dims2(w, OP, "w")?);
        ensure_shape(w, OP, "w", &[outputs, inputs])?;
        ensure_shape(bias, OP, "bias", &[outputs])?;
        return crate::cuda::linear::forward_relu(x, w, bias, (n, inputs, outputs), OP);
    }
    pointwise::forward(&forward(x, w, bias)?, Pointwise::Relu)
}

/// `dx = dy W`: `dy` `[n, out]`, `w` `[out, in]`, `dx` `[n, in]`. With a destination it is written
/// there and the destination's tensor returned.
///
/// # Errors
/// As [`forward`], and [`crate::Error::Aliased`] if the destination shares memory with an input.
pub fn backward_input(dy: &Tensor, w: &Tensor, dx: Option<Dest<'_>>) -> Result<Tensor> {
    const OP: &str = "linear backward_input";
    let (n, outputs) = dims2(dy, OP, "dy")?;
    let (_, inputs) = dims2(w, OP, "w")?;
    ensure_shape(w, OP, "w", &[outputs, inputs])?;
    if let Some((dx, _)) = dx {
        ensure_shape(dx, OP, "dx", &[n, inputs])?;
        ensure_distinct(OP, dx, &[("dy", dy), ("w", w)])?;
    }
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return crate::cuda::linear::backward_input(dy, w, dx, (n, inputs, outputs), OP);
    }
    let (dy_data, w_data) = (view(dy, OP)?, view(w, OP)?);
    let (dy_mat, w_mat) =
        (MatRef::new(&dy_data, n, outputs)?, MatRef::new(&w_data, outputs, inputs)?);
    match dx {
        None => from_vec(product(dy_mat, w_mat, n, inputs)?, (n, inputs), dy.device()),
        Some((dx, accum)) => {
            write_f32(dx, OP, |out| {
                gemm(1.0, dy_mat, w_mat, MatMut::new(out, n, inputs, accum)?, Threads::All)
            })??;
            Ok(dx.clone())
        }
    }
}

/// `dW[rows] (+)= dy[:, rows]^T x`: `dy` `[n, out]`, `x` `[n, in]`, `dw` `[out, in]`. Other rows of `dw`
/// are neither computed nor touched.
///
/// # Errors
/// As [`backward_input`], and [`crate::Error::Range`].
pub fn backward_weight(dy: &Tensor, x: &Tensor, rows: Range<usize>, dw: Dest<'_>) -> Result<()> {
    const OP: &str = "linear backward_weight";
    let (n, outputs) = dims2(dy, OP, "dy")?;
    let (_, inputs) = dims2(x, OP, "x")?;
    let (dw, accum) = dw;
    ensure_shape(x, OP, "x", &[n, inputs])?;
    ensure_shape(dw, OP, "dw", &[outputs, inputs])?;
    ensure_range(&rows, outputs, OP, "rows")?;
    ensure_distinct(OP, dw, &[("dy", dy), ("x", x)])?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        let sizes = (n, inputs, outputs);
        return crate::cuda::linear::backward_weight(dy, x, rows, (dw, accum), sizes, OP);
    }
    let (dy_data, x_data) = (view(dy, OP)?, view(x, OP)?);
    // The rows' columns of `dy`; nothing is left of an empty `dy` to begin at.
    let dy_part = dy_data.get(rows.start..).unwrap_or(&[]);
    let dy_mat = MatRef::with_stride(dy_part, n, rows.len(), outputs)?;
    let x_mat = MatRef::new(&x_data, n, inputs)?;
    write_f32(dw, OP, |dw| {
        let dw = &mut dw[rows.start * inputs..rows.end * inputs];
        let dw_mat = MatMut::new(dw, rows.len(), inputs, accum)?;
        gemm(1.0, dy_mat.t(), x_mat, dw_mat, Threads::All)
    })?
}

/// `db[rows] (+)=` the sums of the columns `rows` of `dy`: `dy` `[n, out]`, `db` `[out]`.
///
/// # Errors
/// As [`backward_weight`].
pub fn backward_bias(dy: &Tensor, rows: Range<usize>, db: Dest<'_>) -> Result<()> {
    const OP: &str = "linear backward_bias";
    let (n, outputs) = dims2(dy, OP, "dy")?;
    let (db, accum) = db;
    ensure_shape(db, OP, "db", &[outputs])?;
    ensure_range(&rows, outputs, OP, "rows")?;
    ensure_distinct(OP, db, &[("dy", dy)])?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return crate::cuda::linear::backward_bias(dy, rows, (db, accum), (n, outputs), OP);
    }
    let _ = n;
    let dy_data = view(dy, OP)?;
    write_f32(db, OP, |db| {
        let db = &mut db[rows.clone()];
        if accum == Accum::Overwrite {
            db.fill(0.0);
        }
        column_sums(&dy_data, outputs, rows.start, db);
    })
}

/// A fresh `rows x cols` product.
fn product(a: MatRef<'_>, b: MatRef<'_>, rows: usize, cols: usize) -> Result<Vec<f32>> {
    let mut done = Ok(());
    // SAFETY: `gemm` writes each element unless it refuses the shapes, and then the vector is dropped
    // without being read.
    let c = unsafe {
        fill_vec(rows * cols, |c| {
            done = MatMut::uninit(c, rows, cols).and_then(|c| gemm(1.0, a, b, c, Threads::All));
        })
    };
    done.map(|()| c)
}

/// `n` copies of a row, one after the other.
fn repeat_row(row: &[f32], n: usize) -> Vec<f32> {
    let (width, total) = (row.len(), row.len() * n);
    // SAFETY: the chunks cover all rows, and each element of each row is written.
    unsafe {
        fill_vec(total, |out| {
            if width == 0 {
                return;
            }
            for_chunks((out, width), n, grain(width), &|(out, width)| {
                for out in out.chunks_exact_mut(width) {
                    for (out, &v) in out.iter_mut().zip(row) {
                        out.write(v);
                    }
                }
            });
        })
    }
}

/// Adds the columns of `a` (rows `width` long) from `first` on to `sums`, rows in order.
fn column_sums(a: &[f32], width: usize, first: usize, sums: &mut [f32]) {
    /// Columns to a chunk: a few cache lines of each row.
    const COLUMNS: usize = 256;

    #[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
    fn add_columns(a: &[f32], width: usize, first: usize, sums: &mut [f32]) {
        for row in a.chunks_exact(width) {
            for (sum, &v) in sums.iter_mut().zip(&row[first..]) {
                *sum += v;
            }
        }
    }

    if width == 0 || sums.is_empty() {
        return;
    }
    let n = sums.len().div_ceil(COLUMNS);
    // One chunk a block of columns; small inputs stay on this thread.
    let grain = if a.len() < crate::par::CHUNK { n } else { 1 };
    for_chunks((0..n, (sums, COLUMNS)), n, grain, &|(blocks, (sums, _))| {
        add_columns(a, width, first + blocks.start * COLUMNS, sums);
    });
}
