//! The loops over rows, once for all formats and instruction sets.
//!
//! Rows are taken several at a time: as many streams for memory, one load of `x` (or of `y`) for
//! all. Each stream is asked for [`AHEAD`] bytes before it is read, and near a row's end the rows
//! that the list names next are: the hardware cannot guess where a list goes on.

use super::lanes::Load;

/// How far ahead memory is asked for, in bytes.
const AHEAD: usize = 1024;
const LINE: usize = 64;

/// Listed rows of one matrix.
#[derive(Clone, Copy)]
pub(super) struct Listed<'a, W> {
    /// The first element that is read in row 0.
    pub base: *const W,
    /// Elements between rows.
    pub stride: usize,
    /// The rows, all of which exist.
    pub list: &'a [u32],
    /// Elements that are read of each; a multiple of [`crate::matrix::PAD`].
    pub n: usize,
}

impl<'a, W> Listed<'a, W> {
    /// Those in a part of the list.
    #[cfg(target_arch = "x86_64")]
    pub fn part(&self, part: std::ops::Range<usize>) -> Listed<'a, W> {
        Listed { list: &self.list[part], base: self.base, stride: self.stride, n: self.n }
    }

    /// Where rows `k..k + R` of the list start; the last again past its end.
    ///
    /// # Safety
    /// The list is not empty.
    #[inline(always)]
    pub unsafe fn at<const R: usize>(&self, k: usize) -> [*const W; R] {
        let last = self.list.len() - 1;
        let mut rows = [self.base; R];
        for (r, row) in rows.iter_mut().enumerate() {
            // SAFETY: at most the last entry.
            let index = unsafe { *self.list.get_unchecked((k + r).min(last)) };
            // A wrapping offset: the row exists, which the compiler need not know.
            *row = self.base.wrapping_add(index as usize * self.stride);
        }
        rows
    }
}

/// Asks for what will be read at element `i + AHEAD` of rows of `n` elements that `next` follow.
///
/// # Safety
/// The instruction set is there.
#[inline(always)]
pub(super) unsafe fn look_ahead<L: Load<W>, W, const R: usize>(
    rows: &[*const W; R],
    next: &[*const W; R],
    i: usize,
    n: usize,
) {
    let at = i + AHEAD / size_of::<W>();
    for r in 0..R {
        let address = if at < n { rows[r].wrapping_add(at) } else { next[r].wrapping_add(at - n) };
        // SAFETY: any address may be asked for; the instruction set is the caller's promise.
        unsafe { L::prefetch(address.cast()) };
    }
}

/// `x . row` for a few rows.
#[inline(always)]
unsafe fn dot_block<L: Load<W> + Load<f32>, W, const R: usize>(
    rows: [*const W; R],
    next: [*const W; R],
    n: usize,
    x: *const f32,
) -> [f32; R] {
    // SAFETY: `n` elements of each row and of `x` are there, in whole lines.
    unsafe {
        let mut sums = [L::splat(0.0); R];
        let line = LINE / size_of::<W>();
        let mut i = 0;
        while i < n {
            look_ahead::<L, W, R>(&rows, &next, i, n);
            let mut j = i;
            while j < i + line {
                let x = <L as Load<f32>>::load(x.add(j));
                for r in 0..R {
                    sums[r] = L::fma(<L as Load<W>>::load(rows[r].add(j)), x, sums[r]);
                }
                j += L::N;
            }
            i += line;
        }
        sums.map(|sum| L::sum(sum))
    }
}

/// `y += coefficient row` for a few rows.
#[inline(always)]
unsafe fn add_block<L: Load<W> + Load<f32>, W, const R: usize>(
    rows: [*const W; R],
    next: [*const W; R],
    coefficients: [f32; R],
    n: usize,
    y: *mut f32,
) {
    // SAFETY: `n` elements of each row and of `y` are there, in whole lines.
    unsafe {
        let coefficients = coefficients.map(|c| L::splat(c));
        let line = LINE / size_of::<W>();
        let mut i = 0;
        while i < n {
            look_ahead::<L, W, R>(&rows, &next, i, n);
            let mut j = i;
            while j < i + line {
                // Two sums, so that half as many additions wait for one another.
                let mut even = <L as Load<f32>>::load(y.add(j));
                let mut odd = L::splat(0.0);
                for r in 0..R {
                    let row = <L as Load<W>>::load(rows[r].add(j));
                    if r % 2 == 0 {
                        even = L::fma(row, coefficients[r], even);
                    } else {
                        odd = L::fma(row, coefficients[r], odd);
                    }
                }
                L::store(y.add(j), L::add(even, odd));
                j += L::N;
            }
            i += line;
        }
    }
}

/// `out[k] = x . row[list[k]]`.
///
/// # Safety
/// The rows, `listed.n` elements of `x`, and as many of `out` as the list has are there; the
/// instruction set is.
#[inline(always)]
pub(super) unsafe fn dot_rows<L: Load<W> + Load<f32>, W>(
    listed: Listed<'_, W>,
    x: *const f32,
    out: &mut [f32],
) {
    let count = listed.list.len();
    let mut k = 0;
    while k < count {
        // SAFETY: the list is not empty and `k` is inside; the rest is the caller's promise.
        unsafe {
            if k + 4 <= count {
                let (rows, next) = (listed.at::<4>(k), listed.at::<4>(k + 4));
                let sums = dot_block::<L, W, 4>(rows, next, listed.n, x);
                out.get_unchecked_mut(k..k + 4).copy_from_slice(&sums);
                k += 4;
            } else {
                let (rows, next) = (listed.at::<1>(k), listed.at::<1>(k + 1));
                *out.get_unchecked_mut(k) = dot_block::<L, W, 1>(rows, next, listed.n, x)[0];
                k += 1;
            }
        }
    }
}

/// `y += coefficients[k] row[list[k]]`.
///
/// # Safety
/// The rows, `listed.n` elements of `y`, and as many coefficients as the list has are there; the
/// instruction set is.
#[inline(always)]
pub(super) unsafe fn add_rows<L: Load<W> + Load<f32>, W>(
    listed: Listed<'_, W>,
    coefficients: &[f32],
    y: *mut f32,
) {
    let count = listed.list.len();
    let mut k = 0;
    while k < count {
        // SAFETY: the list is not empty and `k` is inside; the rest is the caller's promise.
        unsafe {
            if k + 8 <= count {
                let (rows, next) = (listed.at::<8>(k), listed.at::<8>(k + 8));
                let c = std::array::from_fn(|r| *coefficients.get_unchecked(k + r));
                add_block::<L, W, 8>(rows, next, c, listed.n, y);
                k += 8;
            } else if k + 4 <= count {
                let (rows, next) = (listed.at::<4>(k), listed.at::<4>(k + 4));
                let c = std::array::from_fn(|r| *coefficients.get_unchecked(k + r));
                add_block::<L, W, 4>(rows, next, c, listed.n, y);
                k += 4;
            } else {
                let (rows, next) = (listed.at::<1>(k), listed.at::<1>(k + 1));
                add_block::<L, W, 1>(rows, next, [*coefficients.get_unchecked(k)], listed.n, y);
                k += 1;
            }
        }
    }
}

/// `out[k] = scales[k] row[list[k]]`, one row after the other; without scales where there are none.
///
/// # Safety
/// The rows, `listed.n` elements of `out` for each, and a scale for each or none are there; the
/// instruction set is.
#[inline(always)]
pub(super) unsafe fn decode_rows<L: Load<W>, W>(
    listed: Listed<'_, W>,
    scales: &[f32],
    out: *mut f32,
) {
    // SAFETY: the caller's promise; rows are whole lines, and so is what a register holds.
    unsafe {
        for k in 0..listed.list.len() {
            let ([row], [next]) = (listed.at::<1>(k), listed.at::<1>(k + 1));
            let (scale, zero) = (L::splat(scales.get(k).copied().unwrap_or(1.0)), L::splat(0.0));
            let to = out.add(k * listed.n);
            let line = LINE / size_of::<W>();
            for i in (0..listed.n).step_by(line) {
                look_ahead::<L, W, 1>(&[row], &[next], i, listed.n);
                for j in (i..i + line).step_by(L::N) {
                    L::store(to.add(j), L::fma(L::load(row.add(j)), scale, zero));
                }
            }
        }
    }
}

/// What joins a neuron's two rows: `v = gate (up . x * up_scale + bias)`, `y += v down_scale down`.
#[derive(Clone, Copy)]
pub(super) struct Joint<'a> {
    /// The gate's activation, one for each listed neuron.
    pub gate: &'a [f32],
    /// Biases of `up` by neuron; empty where there are none.
    pub bias: &'a [f32],
    /// Scales of the rows of `up` by neuron; empty where there are none.
    pub up_scales: &'a [f32],
    /// Those of `down`.
    pub down_scales: &'a [f32],
}

impl Joint<'_> {
    /// The product at the neuron, and the factor of its row of `down`.
    #[inline(always)]
    pub fn product(&self, neuron: usize, gate: f32, dot: f32) -> (f32, f32) {
        let up = dot * self.up_scales.get(neuron).copied().unwrap_or(1.0)
            + self.bias.get(neuron).copied().unwrap_or(0.0);
        let product = gate * up;
        (product, product * self.down_scales.get(neuron).copied().unwrap_or(1.0))
    }
}

/// Both rows of each listed neuron in one pass, four neurons at a time; `down`'s row follows
/// `up`'s in memory. Writes the products to `products`, one for each listed neuron.
///
/// # Safety
/// As [`dot_rows`] and [`add_rows`]; `down.list` is `up.list`.
#[inline(always)]
pub(super) unsafe fn bundles<L: Load<W> + Load<f32>, W>(
    up: Listed<'_, W>,
    down: Listed<'_, W>,
    joint: &Joint<'_>,
    x: *const f32,
    products: &mut [f32],
    y: *mut f32,
) {
    // SAFETY: the list is not empty where `k` is inside; the rest is the caller's promise.
    unsafe {
        let count = up.list.len();
        let mut k = 0;
        while k < count {
            if k + 4 <= count {
                bundle::<L, W, 4>(&up, &down, joint, k, x, products, y);
                k += 4;
            } else {
                bundle::<L, W, 1>(&up, &down, joint, k, x, products, y);
                k += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn bundle<L: Load<W> + Load<f32>, W, const R: usize>(
    up: &Listed<'_, W>,
    down: &Listed<'_, W>,
    joint: &Joint<'_>,
    k: usize,
    x: *const f32,
    products: &mut [f32],
    y: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let down_rows = down.at::<R>(k);
        let dots = dot_block::<L, W, R>(up.at::<R>(k), down_rows, up.n, x);
        let mut factors = [0.0; R];
        for r in 0..R {
            let neuron = *up.list.get_unchecked(k + r) as usize;
            let gate = *joint.gate.get_unchecked(k + r);
            let (product, factor) = joint.product(neuron, gate, dots[r]);
            *products.get_unchecked_mut(k + r) = product;
            factors[r] = factor;
        }
        add_block::<L, W, R>(down_rows, up.at::<R>(k + R), factors, down.n, y);
    }
}
