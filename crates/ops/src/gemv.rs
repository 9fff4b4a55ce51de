//! Matrix times vector: what a projection costs when one token is decoded. It is bound by reading
//! the matrix, so all threads read.

use std::mem::MaybeUninit;

use multiversion::multiversion;

use crate::math::sum2;
use crate::par;

/// `y[j] = add[j] + w[j] . x` for the rows of the row-major matrix `w`; `add` empty for zeros.
pub(crate) fn gemv(w: &[f32], x: &[f32], add: &[f32], y: &mut [MaybeUninit<f32>]) {
    let n = y.len();
    let grain = par::grain(x.len());
    par::for_chunks(((w, x.len()), (add, 1), (y, 1)), n, grain, &|((w, _), (add, _), (y, _))| {
        rows(w, x, add, y);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn rows(w: &[f32], x: &[f32], add: &[f32], y: &mut [MaybeUninit<f32>]) {
    for (j, y) in y.iter_mut().enumerate() {
        let row = &w[j * x.len()..(j + 1) * x.len()];
        let start = add.get(j).copied().unwrap_or(0.0);
        y.write(start + sum2(row, x, |w, x| w * x));
    }
}
