//! The same norms over each head of a range of columns, in place: the query and key norms of Qwen3.
//!
//! The forward pass overwrites its input, so it keeps a copy. Formulas as in [`crate::norm`].

use std::ops::Range;

use candle_core::Tensor;

use crate::buffer::{Accum, Dest, as_uninit, dims2, ensure_distinct, ensure_range, write_f32};
use crate::curve::with_curve;
use crate::error::{Error, Result};
use crate::norm::{Gain, Norm, NormStats, deposit, rows_per_partial};
use crate::norm_rows::{backward_rows, forward_rows};
use crate::par::{for_chunks, grain};

/// Normalises each head of the columns `cols` of `x` `[n, width]` in place; the norm's weight is
/// `[head_dim]`. The result is what [`backward_heads`] needs.
///
/// # Errors
/// [`Error::Range`], [`Error::Indivisible`] if `cols` is no whole number of heads, [`Error::Aliased`] if the
/// weight is part of `x`, [`Error::Unsupported`] for a norm with bias, [`Error::Shape`],
/// [`Error::NoKernel`], [`Error::NotContiguous`].
pub fn forward_heads(
    x: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    norm: &Norm<'_>,
) -> Result<NormStats> {
    const OP: &str = "norm of heads";
    let (n, width) = dims2(x, OP, "x")?;
    let heads = count_heads(&cols, width, head_dim, OP)?;
    ensure_no_bias(norm, OP)?;
    ensure_distinct(OP, x, &[("weight", norm.weight)])?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::norm::forward_heads(x, cols, head_dim, norm, (n, width), OP);
    }
    let gain = Gain::new(norm, head_dim, OP)?;
    let row = gain.row(norm);
    let mut stats = NormStats::new(norm.kind, n * heads);
    stats.input = vec![0.0; n * cols.len()];
    let NormStats { mean, rstd, input, .. } = &mut stats;
    write_f32(x, OP, |x| {
        with_curve!(norm.post, c => {
            let block = cols.len();
            let items = (
                0..n,
                (x, width),
                (&mut input[..], block),
                (&mut mean[..], heads),
                (&mut rstd[..], heads),
            );
            for_chunks(items, n, grain(block), &|(i, (x, _), (kept, _), (mean, _), (rstd, _))| {
                for t in 0..i.len() {
                    let x = &mut x[t * width..][cols.clone()];
                    let kept = &mut kept[t * block..][..block];
                    kept.copy_from_slice(x);
                    let mean = mean.get_mut(t * heads..(t + 1) * heads).unwrap_or(&mut []);
                    let rstd = &mut rstd[t * heads..(t + 1) * heads];
                    // SAFETY: `forward_rows` stores initialised elements only.
                    forward_rows(c, row, kept, unsafe { as_uninit(x) }, mean, rstd);
                }
            });
        });
    })?;
    Ok(stats)
}

/// The gradients of [`forward_heads`]: the columns `cols` of `dy` `[n, width]` become the input's
/// gradient in place; `dweight` is `[head_dim]`.
///
/// # Errors
/// As [`forward_heads`].
pub fn backward_heads(
    dy: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    norm: &Norm<'_>,
    stats: &NormStats,
    dweight: Option<Dest<'_>>,
) -> Result<()> {
    const OP: &str = "norm of heads backward";
    let (n, width) = dims2(dy, OP, "dy")?;
    let heads = count_heads(&cols, width, head_dim, OP)?;
    ensure_no_bias(norm, OP)?;
    ensure_distinct(OP, dy, &[("weight", norm.weight)])?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        let size = (n, width);
        return crate::cuda::norm::backward_heads(
            dy, cols, head_dim, norm, stats, dweight, size, OP,
        );
    }
    stats.ensure_rows(norm.kind, n * heads, OP)?;
    let block = cols.len();
    if stats.input.len() != n * block {
        let (expected, found) = (vec![n * block], vec![stats.input.len()]);
        return Err(Error::Shape { op: OP, tensor: "stats", expected, found });
    }
    let gain = Gain::new(norm, head_dim, OP)?;
    let row = gain.row(norm);
    let rows = rows_per_partial(n, block);
    let chunks = n.div_ceil(rows);
    let (mut dgain, mut dshift) = (vec![0f32; chunks * head_dim], vec![0f32; chunks * head_dim]);
    write_f32(dy, OP, |dy| {
        with_curve!(norm.post, c => {
            let items = (
                0..chunks,
                (dy, rows * width),
                (&stats.input[..], rows * block),
                (&mut dgain[..], head_dim),
                (&mut dshift[..], head_dim),
            );
            for_chunks(items, chunks, 1, &|(i, (dy, _), (x, _), (dgain, _), (dshift, _))| {
                let stats = stats.slice(i.start * rows * heads, n.min(i.end * rows) * heads);
                let mut gathered = Vec::with_capacity(x.len());
                for dy in dy.chunks_exact(width.max(1)) {
                    gathered.extend_from_slice(&dy[cols.clone()]);
                }
                let mut dx = vec![0.0; x.len()];
                let how = Accum::Overwrite;
                backward_rows(c, row, stats, x, &gathered, &mut dx, how, dgain, dshift);
                for (dy, dx) in dy.chunks_exact_mut(width.max(1)).zip(dx.chunks_exact(block.max(1))) {
                    dy[cols.clone()].copy_from_slice(dx);
                }
            });
        });
    })?;
    deposit(dweight, &dgain, head_dim, OP, "dweight")
}

/// No decoder norms its heads with a bias, so its gradient is not computed.
fn ensure_no_bias(norm: &Norm<'_>, op: &'static str) -> Result<()> {
    match norm.bias {
        Some(_) => Err(Error::Unsupported { op, what: "a bias".into() }),
        None => Ok(()),
    }
}

/// How many heads of `head_dim` the columns hold.
fn count_heads(
    cols: &Range<usize>,
    width: usize,
    head_dim: usize,
    op: &'static str,
) -> Result<usize> {
    ensure_range(cols, width, op, "columns")?;
    if head_dim == 0 || !cols.len().is_multiple_of(head_dim) {
        return Err(Error::Indivisible { op, what: "columns", len: cols.len(), part: head_dim });
    }
    Ok(cols.len() / head_dim)
}
