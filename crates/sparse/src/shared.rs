//! Memory that the workers of one token share: who writes what when is said at each use, and
//! barriers stand between.

use std::cell::UnsafeCell;
use std::ops::Range;

use memmap2::MmapMut;

use crate::matrix::{Rows, anonymous, padded, store};
use crate::{Format, Result};

/// Numbers that workers write in parts.
pub(crate) struct SharedVec(Box<[UnsafeCell<f32>]>);

// SAFETY: the functions' callers promise that nobody writes what another reads or writes.
unsafe impl Sync for SharedVec {}

impl SharedVec {
    /// So many zeros.
    pub fn new(len: usize) -> SharedVec {
        SharedVec((0..len).map(|_| UnsafeCell::new(0.0)).collect())
    }

    /// All of it.
    ///
    /// # Safety
    /// Nobody writes to it while the slice lives.
    pub unsafe fn read(&self) -> &[f32] {
        // SAFETY: `UnsafeCell<f32>` is laid out as `f32`; no writer, as the caller says.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) }
    }

    /// A part, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes the part while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "what the type is for")]
    pub unsafe fn write(&self, part: Range<usize>) -> &mut [f32] {
        let cells = &self.0[part];
        // SAFETY: as in `read`, and the cells allow writing; no other user, as the caller says.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }
}

/// Something that each worker has for itself.
pub(crate) struct PerWorker<T>(Vec<UnsafeCell<T>>);

// SAFETY: each worker uses its own, as `get`'s callers promise.
unsafe impl<T: Send> Sync for PerWorker<T> {}

impl<T> PerWorker<T> {
    pub fn new(workers: usize, make: impl Fn() -> T) -> PerWorker<T> {
        PerWorker((0..workers).map(|_| UnsafeCell::new(make())).collect())
    }

    /// A worker's own.
    ///
    /// # Safety
    /// Only that worker asks for it, once at a time.
    #[allow(clippy::mut_from_ref, reason = "what the type is for")]
    pub unsafe fn get(&self, worker: usize) -> &mut T {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.0[worker].get() }
    }

    /// All of them, between tokens.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(UnsafeCell::get_mut)
    }
}

/// Keys or values of one layer: for each head rows of `head_dim` numbers, one a position.
pub(crate) struct KvRows {
    /// Holds the memory that `start` points to.
    _memory: MmapMut,
    start: *mut u8,
    format: Format,
    heads: usize,
    context: usize,
    head_dim: usize,
}

// SAFETY: the pointer is to memory that the value owns; its functions' callers promise the rest.
unsafe impl Send for KvRows {}
// SAFETY: as above.
unsafe impl Sync for KvRows {}

impl KvRows {
    pub fn new(format: Format, heads: usize, context: usize, head_dim: usize) -> Result<KvRows> {
        let bytes = heads * context * padded(head_dim) * format.bytes();
        let mut memory = anonymous(bytes)?;
        let start = memory.as_mut_ptr();
        Ok(KvRows { _memory: memory, start, format, heads, context, head_dim })
    }

    fn row_bytes(&self) -> usize {
        padded(self.head_dim) * self.format.bytes()
    }

    /// The rows of a head at the first `len` positions.
    ///
    /// # Safety
    /// Nobody writes to these while they are used.
    pub unsafe fn rows(&self, head: usize, len: usize) -> Rows<'_> {
        assert!(head < self.heads && len <= self.context, "no such keys");
        let from = head * self.context * self.row_bytes();
        // SAFETY: inside the memory, by the assertion; no writer, as the caller says.
        let data =
            unsafe { std::slice::from_raw_parts(self.start.add(from), len * self.row_bytes()) };
        Rows {
            format: self.format,
            data,
            stride: padded(self.head_dim),
            rows: len,
            cols: self.head_dim,
            scales: &[],
        }
    }

    /// Writes the row of a head at a position.
    ///
    /// # Safety
    /// Nobody else reads or writes this row meanwhile.
    pub unsafe fn store(&self, head: usize, position: usize, values: &[f32]) {
        assert!(head < self.heads && position < self.context && values.len() == self.head_dim);
        let from = (head * self.context + position) * self.row_bytes();
        // SAFETY: inside the memory, by the assertion; no other user, as the caller says.
        let row = unsafe { std::slice::from_raw_parts_mut(self.start.add(from), self.row_bytes()) };
        store(self.format, values, row);
    }
}
