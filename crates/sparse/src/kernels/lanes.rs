//! What the loops ask of an instruction set: a few numbers side by side.

/// A register of f32 numbers on some instruction set.
///
/// # Safety
/// Its functions may only run where the processor has that instruction set, and the loops inline
/// them into functions that are compiled for it.
pub(super) unsafe trait Lanes: Copy {
    /// How many numbers; divides 16.
    const N: usize;
    /// The register.
    type V: Copy;

    /// All `x`.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn splat(x: f32) -> Self::V;
    /// `a * b + c`.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of the numbers.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn sum(v: Self::V) -> f32;
    /// Writes `N` numbers.
    ///
    /// # Safety
    /// As the trait says, and `to` can be written.
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Asks for the cache line at an address, which need not exist.
    ///
    /// # Safety
    /// As the trait says.
    unsafe fn prefetch(at: *const u8);
}

/// Reading weights of one format into registers.
///
/// # Safety
/// As [`Lanes`].
pub(super) unsafe trait Load<W>: Lanes {
    /// The next `N` weights as f32; units where the format has a scale.
    ///
    /// # Safety
    /// As [`Lanes`], and `from` can be read.
    unsafe fn load(from: *const W) -> Self::V;
}

/// Bits of IEEE half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct F16(pub u16);

/// The upper half of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bf16(pub u16);
