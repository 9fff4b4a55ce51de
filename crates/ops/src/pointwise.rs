//! Activation functions over whole tensors: `y = f(x)` and `dx = f'(x) dy`.

use std::mem::MaybeUninit;

use candle_core::Tensor;
use multiversion::multiversion;

use crate::buffer::{ensure_distinct, ensure_shape, fill_vec, from_vec, view, write_f32};
use crate::curve::{Curve, with_curve};
use crate::error::Result;
use crate::par::{CHUNK, for_chunks};

/// An activation function. Derivatives are 0 at a kink, as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pointwise {
    /// `x`.
    Identity,
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)` with the normal distribution: the exact GELU.
    Gelu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x sigmoid(beta x)` (ReLU Strikes Back, section 3.2).
    Swish {
        /// The slope inside the sigmoid.
        beta: f32,
    },
    /// `max(x, 0)`.
    Relu,
    /// `max(x - shift, 0)` (ReLU Strikes Back, section 5.3).
    ShiftedRelu {
        /// What is subtracted.
        shift: f32,
    },
    /// `x` where `x >= threshold`, else 0 (FATReLU, as in ProSparse).
    FatRelu {
        /// The smallest value that passes.
        threshold: f32,
    },
}

/// `f(x)`, of the shape of `x`.
///
/// # Errors
/// [`crate::Error::NoKernel`], [`crate::Error::NotContiguous`].
pub fn forward(x: &Tensor, f: Pointwise) -> Result<Tensor> {
    const OP: &str = "pointwise";
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::pointwise::forward(x, f, OP);
    }
    let data = view(x, OP)?;
    let (x_all, n) = (&*data, data.len());
    // SAFETY: `value` writes each element of each chunk.
    let y = unsafe {
        fill_vec(n, |y| {
            with_curve!(f, c => for_chunks(((x_all, 1), (y, 1)), n, CHUNK, &|(x, y)| {
                value(c, x.0, y.0);
            }));
        })
    };
    from_vec(y, x.shape(), x.device())
}

/// `f` of each element of a slice, in place: the same numbers as [`forward`], for decoders that work
/// without tensors.
pub fn apply_to_slice(x: &mut [f32], f: Pointwise) {
    with_curve!(f, c => value_in_place(c, x));
}

/// `f'(x) dy`, of the shape of `x`.
///
/// # Errors
/// [`crate::Error::Shape`] if `dy` has another shape; [`crate::Error::NoKernel`], [`crate::Error::NotContiguous`].
pub fn backward(x: &Tensor, f: Pointwise, dy: &Tensor) -> Result<Tensor> {
    const OP: &str = "pointwise backward";
    ensure_shape(dy, OP, "dy", x.dims())?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let dx = crate::cuda::empty_like(x, OP)?;
        crate::cuda::pointwise::backward(x, f, dy, &dx, OP)?;
        return Ok(dx);
    }
    let (x_data, dy_data) = (view(x, OP)?, view(dy, OP)?);
    let (x_all, dy_all, n) = (&*x_data, &*dy_data, x_data.len());
    // SAFETY: `pull` writes each element of each chunk.
    let dx = unsafe {
        fill_vec(n, |dx| {
            with_curve!(f, c => {
                for_chunks(((x_all, 1), (dy_all, 1), (dx, 1)), n, CHUNK, &|(x, dy, dx)| {
                    pull(c, x.0, dy.0, dx.0);
                });
            });
        })
    };
    from_vec(dx, x.shape(), x.device())
}

/// As [`backward`], writing the result over `dy`.
///
/// # Errors
/// As [`backward`], and [`crate::Error::Aliased`] if `x` and `dy` share memory.
pub fn backward_in_place(x: &Tensor, f: Pointwise, dy: &Tensor) -> Result<()> {
    const OP: &str = "pointwise backward";
    ensure_shape(dy, OP, "dy", x.dims())?;
    ensure_distinct(OP, dy, &[("x", x)])?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::pointwise::backward(x, f, dy, dy, OP);
    }
    let x_data = view(x, OP)?;
    let (x_all, n) = (&*x_data, x_data.len());
    write_f32(dy, OP, |dy| {
        with_curve!(f, c => for_chunks(((x_all, 1), (dy, 1)), n, CHUNK, &|(x, dy)| {
            pull_in_place(c, x.0, dy.0);
        }));
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn value<C: Curve>(c: C, x: &[f32], y: &mut [MaybeUninit<f32>]) {
    for (y, &x) in y.iter_mut().zip(x) {
        y.write(c.value(x));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn value_in_place<C: Curve>(c: C, x: &mut [f32]) {
    for x in x {
        *x = c.value(*x);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn pull<C: Curve>(c: C, x: &[f32], dy: &[f32], dx: &mut [MaybeUninit<f32>]) {
    for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
        dx.write(c.value_and_pull(x, dy).1);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn pull_in_place<C: Curve>(c: C, x: &[f32], dy: &mut [f32]) {
    for (dy, &x) in dy.iter_mut().zip(x) {
        *dy = c.value_and_pull(x, *dy).1;
    }
}
