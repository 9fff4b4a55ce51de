//! The gated MLP's middle: `h = f(gate) * up`, where one product has written both: `gu = [gate | up]`.
//!
//! Backward, with `dh` the gradient of `h`: `dgate = f'(gate) up dh`, `dup = f(gate) dh`. `f` is computed
//! again rather than kept.

use std::mem::MaybeUninit;

use candle_core::Tensor;
use multiversion::multiversion;

use crate::buffer::{dims2, ensure_distinct, ensure_shape, fill_vec, from_vec, view, write_f32};
use crate::curve::{Curve, with_curve};
use crate::error::{Error, Result};
use crate::par::{CHUNK, for_chunks, grain};
use crate::pointwise::Pointwise;

/// `f(gate) * up`: `gu` `[n, 2 ffn]`, result `[n, ffn]`.
///
/// # Errors
/// [`Error::Indivisible`] for an odd width, [`Error::Rank`], [`Error::NoKernel`], [`Error::NotContiguous`].
pub fn forward(gu: &Tensor, f: Pointwise) -> Result<Tensor> {
    const OP: &str = "gated";
    let (n, ffn) = halves(gu, OP)?;
    #[cfg(feature = "cuda")]
    if gu.device().is_cuda() {
        return crate::cuda::gated::forward(gu, f, (n, ffn), OP);
    }
    let data = view(gu, OP)?;
    let gu_all = &*data;
    // SAFETY: `gate` writes each element of each row of each chunk.
    let h = unsafe {
        fill_vec(n * ffn, |h| {
            with_curve!(f, c => {
                let items = ((gu_all, 2 * ffn), (h, ffn));
                for_chunks(items, n, grain(ffn), &|((gu, _), (h, _))| gate(c, ffn, gu, h));
            });
        })
    };
    from_vec(h, (n, ffn), gu.device())
}

/// The gradient of `gu` `[n, 2 ffn]` from that of the product, `dh` `[n, ffn]`.
///
/// # Errors
/// As [`forward`], and [`Error::Shape`].
pub fn backward(gu: &Tensor, f: Pointwise, dh: &Tensor) -> Result<Tensor> {
    const OP: &str = "gated backward";
    let (n, ffn) = halves(gu, OP)?;
    ensure_shape(dh, OP, "dh", &[n, ffn])?;
    #[cfg(feature = "cuda")]
    if gu.device().is_cuda() {
        return crate::cuda::gated::backward(gu, f, dh, (n, ffn), OP);
    }
    let (gu_data, dh_data) = (view(gu, OP)?, view(dh, OP)?);
    let (gu_all, dh_all) = (&*gu_data, &*dh_data);
    // SAFETY: `ungate` writes each element of each row of each chunk.
    let dgu = unsafe {
        fill_vec(n * 2 * ffn, |dgu| {
            with_curve!(f, c => {
                let items = ((gu_all, 2 * ffn), (dh_all, ffn), (dgu, 2 * ffn));
                for_chunks(items, n, grain(ffn), &|((gu, _), (dh, _), (dgu, _))| {
                    ungate(c, ffn, gu, dh, dgu);
                });
            });
        })
    };
    from_vec(dgu, (n, 2 * ffn), gu.device())
}

/// [`backward`] and [`forward`] at once, `(dgu, h)`: for who did not keep `h` and needs it again for
/// the gradient of the weights behind it.
///
/// # Errors
/// As [`backward`].
pub fn backward_with_output(gu: &Tensor, f: Pointwise, dh: &Tensor) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if gu.device().is_cuda() {
        const OP: &str = "gated backward";
        let (n, ffn) = halves(gu, OP)?;
        ensure_shape(dh, OP, "dh", &[n, ffn])?;
        return crate::cuda::gated::backward_with_output(gu, f, dh, (n, ffn), OP);
    }
    Ok((backward(gu, f, dh)?, forward(gu, f)?))
}

/// Activation regularisation: adds `lambda sign(h)` to `dh` in place and returns the sum of `|h|`.
///
/// The caller has divided `lambda` by whatever count its loss is a mean over. `sign(0) = 0`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Aliased`], [`Error::NoKernel`], [`Error::NotContiguous`].
pub fn add_l1_gradient(h: &Tensor, lambda: f32, dh: &Tensor) -> Result<f64> {
    const OP: &str = "add_l1_gradient";
    ensure_shape(dh, OP, "dh", h.dims())?;
    ensure_distinct(OP, dh, &[("h", h)])?;
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() {
        return crate::cuda::gated::add_l1_gradient(h, lambda, dh, OP);
    }
    let h_data = view(h, OP)?;
    let (h_all, n) = (&*h_data, h_data.len());
    // One partial sum a chunk, added in order.
    let mut sums = vec![0f64; n.div_ceil(CHUNK)];
    let chunks = sums.len();
    write_f32(dh, OP, |dh| {
        let items = ((h_all, CHUNK), (dh, CHUNK), (&mut sums[..], 1));
        for_chunks(items, chunks, 1, &|((h, _), (dh, _), (sums, _))| {
            for ((h, dh), sum) in h.chunks(CHUNK).zip(dh.chunks_mut(CHUNK)).zip(sums) {
                *sum = add_signs(h, lambda, dh);
            }
        });
    })?;
    Ok(sums.iter().sum())
}

/// The rows and half the columns of `[gate | up]`.
fn halves(gu: &Tensor, op: &'static str) -> Result<(usize, usize)> {
    let (n, width) = dims2(gu, op, "gu")?;
    if width % 2 != 0 {
        return Err(Error::Indivisible { op, what: "width of gu", len: width, part: 2 });
    }
    Ok((n, width / 2))
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn gate<C: Curve>(c: C, ffn: usize, gu: &[f32], h: &mut [MaybeUninit<f32>]) {
    for (gu, h) in gu.chunks_exact((2 * ffn).max(1)).zip(h.chunks_exact_mut(ffn.max(1))) {
        let (gate, up) = gu.split_at(ffn);
        for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
            h.write(c.value(gate) * up);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn ungate<C: Curve>(c: C, ffn: usize, gu: &[f32], dh: &[f32], dgu: &mut [MaybeUninit<f32>]) {
    let (wide, narrow) = ((2 * ffn).max(1), ffn.max(1));
    let rows = gu.chunks_exact(wide).zip(dh.chunks_exact(narrow)).zip(dgu.chunks_exact_mut(wide));
    for ((gu, dh), dgu) in rows {
        let (gate, up) = gu.split_at(ffn);
        let (dgate, dup) = dgu.split_at_mut(ffn);
        for i in 0..ffn {
            let (value, pulled) = c.value_and_pull(gate[i], dh[i] * up[i]);
            dgate[i].write(pulled);
            dup[i].write(value * dh[i]);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn add_signs(h: &[f32], lambda: f32, dh: &mut [f32]) -> f64 {
    // `signum` maps 0 to 1; and a NaN must stay visible.
    let sign = |h: f32| if h == 0.0 { 0.0 } else { 1f32.copysign(h) };
    for (dh, &h) in dh.iter_mut().zip(h) {
        *dh += lambda * sign(h);
    }
    let mut lanes = [0f64; 16];
    let blocks = h.chunks_exact(16);
    let rest: f64 = blocks.remainder().iter().map(|h| f64::from(h.abs())).sum();
    for block in blocks {
        for (lane, h) in lanes.iter_mut().zip(block) {
            *lane += f64::from(h.abs());
        }
    }
    lanes.iter().sum::<f64>() + rest
}
