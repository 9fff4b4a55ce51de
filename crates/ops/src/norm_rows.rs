//! The inner loops of the norms: rows of one width, on one thread.

use std::mem::MaybeUninit;

use multiversion::multiversion;

use crate::buffer::Accum;
use crate::curve::Curve;
use crate::math::{sum1, sum2};

/// What all rows share.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    /// LayerNorm.
    pub(crate) centred: bool,
    pub(crate) eps: f32,
    /// As long as the row.
    pub(crate) gain: &'a [f32],
    /// As long as the row; zeros if there is none.
    pub(crate) bias: &'a [f32],
}

impl Row<'_> {
    /// The mean (0 for RMSNorm) and `1 / sqrt(variance + eps)` of a row.
    #[inline(always)]
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let count = self.gain.len() as f32;
        let mean = if self.centred { sum1(x, |x| x) / count } else { 0.0 };
        let variance = sum1(x, |x| (x - mean) * (x - mean)) / count;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
}

/// Rows of `post(xhat gain + bias)`; `mean` is left alone if it is empty.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub(crate) fn forward_rows<C: Curve>(
    post: C,
    row: Row<'_>,
    x: &[f32],
    y: &mut [MaybeUninit<f32>],
    means: &mut [f32],
    rstds: &mut [f32],
) {
    let width = row.gain.len().max(1);
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstds).enumerate();
    for (i, ((x, y), rstd)) in rows {
        let (mean, r) = row.moments(x);
        *rstd = r;
        if let Some(slot) = means.get_mut(i) {
            *slot = mean;
        }
        for (((y, &x), &g), &b) in y.iter_mut().zip(x).zip(row.gain).zip(row.bias) {
            y.write(post.value((x - mean) * r * g + b));
        }
    }
}

/// Rows of gradients: `dx` is written or added to, `dgain` and `dbias` (one row each) are added to.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
#[allow(clippy::too_many_arguments, reason = "slices of one chunk")]
pub(crate) fn backward_rows<C: Curve>(
    post: C,
    row: Row<'_>,
    (means, rstds): (&[f32], &[f32]),
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accum: Accum,
    dgain: &mut [f32],
    dbias: &mut [f32],
) {
    let width = row.gain.len();
    // `c` and `xhat` of the row at hand.
    let (mut c, mut normalised) = (vec![0f32; width], vec![0f32; width]);
    let step = width.max(1);
    let rows = x.chunks_exact(step).zip(dy.chunks_exact(step)).zip(dx.chunks_exact_mut(step));
    for (i, (((x, dy), dx), &r)) in rows.zip(rstds).enumerate() {
        let mean = means.get(i).copied().unwrap_or(0.0);
        let inputs = x.iter().zip(dy).zip(row.gain).zip(row.bias);
        let outputs = normalised.iter_mut().zip(&mut c).zip(dgain.iter_mut()).zip(dbias.iter_mut());
        for ((((&x, &dy), &g), &b), (((normalised, c), dgain), dbias)) in inputs.zip(outputs) {
            let xhat = (x - mean) * r;
            let (_, dz) = post.value_and_pull(xhat * g + b, dy);
            *normalised = xhat;
            *c = dz * g;
            *dgain += dz * xhat;
            *dbias += dz;
        }
        let count = width as f32;
        let along = sum2(&c, &normalised, |c, xhat| c * xhat) / count;
        let level = if row.centred { sum1(&c, |c| c) / count } else { 0.0 };
        let terms = dx.iter_mut().zip(&c).zip(&normalised);
        match accum {
            Accum::Overwrite => {
                terms.for_each(|((dx, c), xhat)| *dx = r * (c - level - xhat * along));
            }
            Accum::Add => {
                terms.for_each(|((dx, c), xhat)| *dx += r * (c - level - xhat * along));
            }
        }
    }
}
