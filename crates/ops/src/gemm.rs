//! The one door to the matrix-product library: C (+)= alpha A B on strided f32 matrices.
//!
//! Work is split over the destination only, never over the inner dimension, so that the result does
//! not depend on the number of threads.

use std::mem::MaybeUninit;

use gemm::Parallelism;

pub use crate::buffer::Accum;
use crate::buffer::as_uninit;
use crate::error::{Error, Result};

/// Multiply-adds below which a product stays on the calling thread: waking another costs more.
const PARALLEL_FROM: usize = 1 << 20;

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: for callers that are parallel themselves.
    One,
    /// All threads of the current rayon pool, if the product is large enough to be worth it.
    All,
}

/// A matrix to read: `rows x cols` elements of a slice at the given strides.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix that fills `data` from its start.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows begin `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short.
    pub fn with_stride(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        ensure_fits(data.len(), rows, cols, row_stride)?;
        Ok(Self { data, rows, cols, row_stride, col_stride: 1 })
    }

    /// The transposed matrix, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A row-major matrix to write: `rows x cols` elements, rows `row_stride` elements apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [MaybeUninit<f32>],
    rows: usize,
    cols: usize,
    row_stride: usize,
    accum: Accum,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix that fills `data` from its start, and how it is written.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, accum: Accum) -> Result<Self> {
        Self::with_stride(data, rows, cols, cols, accum)
    }

    /// A row-major matrix whose rows begin `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short.
    pub fn with_stride(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
        accum: Accum,
    ) -> Result<Self> {
        ensure_fits(data.len(), rows, cols, row_stride)?;
        // SAFETY: a product stores initialised elements only.
        let data = unsafe { as_uninit(data) };
        Ok(Self { data, rows, cols, row_stride, accum })
    }

    /// A row-major matrix over fresh memory: it is overwritten, all `rows x cols` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short.
    pub fn uninit(data: &'a mut [MaybeUninit<f32>], rows: usize, cols: usize) -> Result<Self> {
        ensure_fits(data.len(), rows, cols, cols)?;
        Ok(Self { data, rows, cols, row_stride: cols, accum: Accum::Overwrite })
    }
}

/// C (+)= alpha A B.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together; nothing is written then.
pub fn gemm(alpha: f32, a: MatRef<'_>, b: MatRef<'_>, c: MatMut<'_>, who: Threads) -> Result<()> {
    let wrong = |tensor, expected, found| Error::Shape { op: "gemm", tensor, expected, found };
    if a.cols != b.rows {
        return Err(wrong("b", vec![a.cols, b.cols], vec![b.rows, b.cols]));
    }
    if (c.rows, c.cols) != (a.rows, b.cols) {
        return Err(wrong("c", vec![a.rows, b.cols], vec![c.rows, c.cols]));
    }
    let work = c.rows.saturating_mul(c.cols).saturating_mul(a.cols);
    let parallelism = match who {
        Threads::All if work >= PARALLEL_FROM => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: the constructors checked that each matrix lies inside its slice, the slices live
    // through the call, `c` is exclusive, and it is read only where the caller holds initialised
    // elements (`Accum::Add` cannot be made over fresh memory).
    unsafe {
        gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr().cast::<f32>(),
            1,
            c.row_stride as isize,
            c.accum == Accum::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
    Ok(())
}

fn ensure_fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<()> {
    let too_short = || Error::Shape {
        op: "gemm",
        tensor: "matrix",
        expected: vec![rows, cols, row_stride],
        found: vec![len],
    };
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let end = (rows - 1).checked_mul(row_stride).and_then(|last| last.checked_add(cols));
    match end {
        // Rows that overlap would be written twice.
        Some(end) if end <= len && (row_stride >= cols || rows == 1) => Ok(()),
        _ => Err(too_short()),
    }
}
