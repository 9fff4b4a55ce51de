//! The small products inside a task: one thread, strided operands, raw destination.

/// A read-only matrix inside a slice: element (r, c) at `r * rs + c * cs`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rs: usize,
    cs: usize,
}

impl<'a> View<'a> {
    /// Rows `stride` apart, columns next to one another.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, rs: stride, cs: 1 }
    }

    pub(super) fn t(self) -> Self {
        Self { data: self.data, rs: self.cs, cs: self.rs }
    }

    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.rs + (cols - 1) * self.cs < self.data.len()
    }
}

/// A buffer to which tasks write at the same time, each to elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    ptr: *mut f32,
    len: usize,
}

// SAFETY: a `Shared` is only an address; its unsafe methods make the caller promise that no two
// threads touch the same element.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(data: &mut [f32]) -> Self {
        Self { ptr: data.as_mut_ptr(), len: data.len() }
    }

    /// The elements `at..at+len`.
    ///
    /// # Safety
    /// The buffer is alive and nobody else reads or writes these elements meanwhile.
    #[allow(clippy::mut_from_ref, reason = "exclusive by the caller's promise")]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at + len <= self.len);
        // SAFETY: in bounds by the line above, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }

    /// `dst (+)= a b` for the `m x n` matrix whose first element is `at` and whose rows are
    /// `stride` apart.
    ///
    /// # Safety
    /// The buffer is alive and nobody else reads or writes these elements meanwhile.
    #[allow(clippy::too_many_arguments, reason = "a matrix product has this many sizes")]
    pub(super) unsafe fn product(
        &self,
        at: usize,
        stride: usize,
        (m, k, n): (usize, usize, usize),
        a: View<'_>,
        b: View<'_>,
        add: bool,
    ) {
        if m == 0 || n == 0 {
            return;
        }
        assert!(at + (m - 1) * stride + n <= self.len && stride >= n);
        assert!(a.holds(m, k) && b.holds(k, n));
        // SAFETY: the asserts keep every element of the three matrices inside its buffer; the
        // destination is exclusive by the caller's promise.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.ptr.add(at),
                1,
                stride as isize,
                add,
                a.data.as_ptr(),
                a.cs as isize,
                a.rs as isize,
                b.data.as_ptr(),
                b.cs as isize,
                b.rs as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// `dst = a b`, `dst` row-major and dense.
pub(super) fn product(dst: &mut [f32], sizes: (usize, usize, usize), a: View<'_>, b: View<'_>) {
    // SAFETY: `dst` is borrowed exclusively.
    unsafe { Shared::new(dst).product(0, sizes.2, sizes, a, b, false) }
}
