//! Matrix products: C (+)= alpha A B on row-major matrices, through cuBLAS.
//!
//! bf16 and f32 matrices are multiplied with f32 sums (f32 ones without TF32); C may be f32 where A
//! and B are bf16, which is how gradients gather in full precision. cuBLAS stores by column, so
//! what it is told is `C^T = B^T A^T`.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};

use super::gpu::Gpu;
use super::operand::{Elem, Operand};
use crate::buffer::Accum;
use crate::error::{Error, Result};

/// A matrix on the GPU: `rows x cols` elements, rows (of the stored matrix) `stride` apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat {
    pub(super) ptr: u64,
    pub(super) elem: Elem,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    transposed: bool,
}

impl Mat {
    /// A row-major matrix from element `start` on.
    pub(crate) fn at(
        operand: &Operand,
        start: usize,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Mat {
        Mat { ptr: operand.at(start), elem: operand.elem, rows, cols, stride, transposed: false }
    }

    /// A row-major matrix that fills its operand.
    pub(crate) fn new(operand: &Operand, rows: usize, cols: usize) -> Mat {
        Mat::at(operand, 0, rows, cols, cols)
    }

    /// The transposed matrix, without moving anything.
    pub(crate) fn t(self) -> Mat {
        Mat { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }
}

/// `C (+)= alpha A B`; C is row-major.
///
/// # Errors
/// Shapes that do not fit; an error of cuBLAS.
pub(crate) fn gemm(
    gpu: &Gpu,
    op: &'static str,
    alpha: f32,
    a: Mat,
    b: Mat,
    c: Mat,
    accum: Accum,
) -> Result<()> {
    if a.cols != b.rows || a.rows != c.rows || b.cols != c.cols || a.elem != b.elem || c.transposed
    {
        let message = format!("cannot multiply {a:?} with {b:?} into {c:?}");
        return Err(Error::Invalid { op, message });
    }
    if c.rows == 0 || c.cols == 0 {
        return Ok(());
    }
    let blas = gpu.device.cublas_handle();
    let beta = if accum == Accum::Add { 1f32 } else { 0f32 };
    let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
    let sizes = [c.cols, c.rows, a.cols, b.stride, a.stride, c.stride];
    let [n, m, k, b_stride, a_stride, c_stride] = ints(sizes, op)?;
    gpu.bind(op)?;
    // SAFETY: the matrices lie within their tensors, whose shapes the caller has checked; work on
    // the stream keeps their memory.
    let multiply = || unsafe {
        result::gemm_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            n,
            m,
            k,
            alpha.cast(),
            b.ptr as *const c_void,
            data_type(b.elem),
            b_stride,
            a.ptr as *const c_void,
            data_type(a.elem),
            a_stride,
            beta.cast(),
            c.ptr as *mut c_void,
            data_type(c.elem),
            c_stride,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    gpu.timed(
        || label(op, m, k, n),
        || multiply().map_err(|error| Error::Cuda { op, message: format!("cuBLAS: {error:?}") }),
    )
}

/// A product of `m x k` and `k x n` in a profile.
pub(super) fn label(op: &str, m: i32, k: i32, n: i32) -> (String, f64) {
    (format!("{op}: {m} x {k} x {n}"), 2.0 * f64::from(m) * f64::from(k) * f64::from(n))
}

/// A row-major matrix is the transposed one to cuBLAS, which is what it wants.
fn operation(mat: Mat) -> sys::cublasOperation_t {
    match mat.transposed {
        false => sys::cublasOperation_t::CUBLAS_OP_N,
        true => sys::cublasOperation_t::CUBLAS_OP_T,
    }
}

fn data_type(elem: Elem) -> sys::cudaDataType_t {
    match elem {
        Elem::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Elem::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

/// Sides and strides as cuBLAS counts them.
fn ints<const N: usize>(values: [usize; N], op: &'static str) -> Result<[i32; N]> {
    let mut ints = [0; N];
    for (int, value) in ints.iter_mut().zip(values) {
        *int = i32::try_from(value).map_err(|_| {
            let what = format!("a matrix with a side of {value}");
            Error::Unsupported { op, what }
        })?;
    }
    Ok(ints)
}
