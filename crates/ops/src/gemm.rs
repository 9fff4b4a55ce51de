//! The one door to the matrix-product library: C (+)= alpha A B on strided f32 matrices.
//!
//! Work is split over the destination only, never over the inner dimension, so that the result does
//! not depend on the number of threads.

use std::mem::MaybeUninit;
use std::ops::Range;

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
    let pieces = match who {
        Threads::All if work >= PARALLEL_FROM => rayon::current_num_threads(),
        _ => 1,
    };
    let product = Product { alpha, a, b, c: c.data.as_mut_ptr().cast(), shape: &c };
    let (longer, by_rows) = (c.rows.max(c.cols), c.rows > c.cols);
    fork(0..pieces.min(longer / LEAST_PIECE).max(1), &|piece, pieces| {
        let cut = |at: usize| match at {
            _ if at == pieces => longer,
            _ => longer * at / pieces / ALIGNED * ALIGNED,
        };
        let range = cut(piece)..cut(piece + 1);
        // SAFETY: the constructors checked that each matrix lies inside its slice, and the
        // ranges of the pieces lie inside `c` and do not meet.
        unsafe {
            match by_rows {
                true => product.run(range, 0..c.cols),
                false => product.run(0..c.rows, range),
            }
        }
    });
    Ok(())
}

/// Cuts lie at multiples of this, the rows of the gemm crate's tile.
const ALIGNED: usize = 64;

/// Each thread computes one piece of the product's longer side, at least this long: the gemm
/// crate's own sharing of panels between threads was 5 to 20 % slower at the shapes of a
/// training step. Products of at most 64 x 64 are summed in another order there; after
/// cutting at [`ALIGNED`] every piece is still longer than that, so that an element's sum is
/// the same whatever the number of threads.
const LEAST_PIECE: usize = 2 * ALIGNED;

/// Calls `work(piece, pieces)` for each piece, side by side.
fn fork(pieces: Range<usize>, work: &(impl Fn(usize, usize) + Sync)) {
    fn halve(part: Range<usize>, all: usize, work: &(impl Fn(usize, usize) + Sync)) {
        match part.len() {
            0 => {}
            1 => work(part.start, all),
            len => {
                let middle = part.start + len / 2;
                rayon::join(
                    || halve(part.start..middle, all, work),
                    || halve(middle..part.end, all, work),
                );
            }
        }
    }
    halve(pieces.clone(), pieces.end, work);
}

/// A product whose pieces several threads compute.
struct Product<'a> {
    alpha: f32,
    a: MatRef<'a>,
    b: MatRef<'a>,
    /// First element of the result.
    c: *mut f32,
    shape: &'a MatMut<'a>,
}

// SAFETY: `c` is written in pieces that do not meet (`Product::run`); all else is only read.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes the given rows and columns of the result.
    ///
    /// # Safety
    /// They must lie inside it, and no other thread may compute any of them. With
    /// [`Accum::Add`] they must be initialised (which cannot be made over fresh memory).
    unsafe fn run(&self, rows: Range<usize>, cols: Range<usize>) {
        let Product { alpha, a, b, c, shape } = *self;
        // SAFETY: as the caller promises.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                a.cols,
                c.add(rows.start * shape.row_stride + cols.start),
                1,
                shape.row_stride as isize,
                shape.accum == Accum::Add,
                a.data.as_ptr().add(rows.start * a.row_stride),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().add(cols.start * b.col_stride),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                alpha,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
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
