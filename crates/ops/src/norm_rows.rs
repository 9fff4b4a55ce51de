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
    /// As long as the row, or empty.
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
        if row.bias.is_empty() {
            for ((y, &x), &g) in y.iter_mut().zip(x).zip(row.gain) {
                y.write(post.value((x - mean) * r * g));
            }
        } else {
            for (((y, &x), &g), &b) in y.iter_mut().zip(x).zip(row.gain).zip(row.bias) {
                y.write(post.value((x - mean) * r * g + b));
            }
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
    let (c, normalised) = (&mut c[..width], &mut normalised[..width]);
    let (gain, dgain, dbias) = (&row.gain[..width], &mut dgain[..width], &mut dbias[..width]);
    let step = width.max(1);
    let rows = x.chunks_exact(step).zip(dy.chunks_exact(step)).zip(dx.chunks_exact_mut(step));
    for (i, (((x, dy), dx), &r)) in rows.zip(rstds).enumerate() {
        let mean = means.get(i).copied().unwrap_or(0.0);
        let (x, dy, dx) = (&x[..width], &dy[..width], &mut dx[..width]);
        for j in 0..width {
            let xhat = (x[j] - mean) * r;
            let bias = if row.bias.is_empty() { 0.0 } else { row.bias[j] };
            let (_, dz) = post.value_and_pull(xhat * gain[j] + bias, dy[j]);
            normalised[j] = xhat;
            c[j] = dz * gain[j];
            dgain[j] += dz * xhat;
            dbias[j] += dz;
        }
        let count = width as f32;
        let along = sum2(c, normalised, |c, xhat| c * xhat) / count;
        let level = if row.centred { sum1(c, |c| c) / count } else { 0.0 };
        match accum {
            Accum::Overwrite => {
                for j in 0..width {
                    dx[j] = r * (c[j] - level - normalised[j] * along);
                }
            }
            Accum::Add => {
                for j in 0..width {
                    dx[j] += r * (c[j] - level - normalised[j] * along);
                }
            }
        }
    }
}
