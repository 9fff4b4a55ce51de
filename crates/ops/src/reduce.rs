//! Reductions over whole tensors, and the small in-place steps of a training loop.
//!
//! A tensor is cut into chunks of fixed size; partial results are combined in their order, whatever
//! thread made them.

use candle_core::Tensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::buffer::{dims2, ensure_distinct, ensure_shape, view, write_f32};
use crate::error::{Error, Result};
use crate::vmath::LANES;

const OP: &str = "reduce";

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// The sum of squares, in f64: for the norm of a gradient.
///
/// # Errors
/// No kernel for the device or dtype, or not contiguous; so for every function here.
pub fn sum_of_squares(t: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::sum_of_squares(t, OP);
    }
    Ok(over_chunks(t, squares)?.into_iter().sum())
}

/// The sum of squares over many tensors of one device, as if they were one: for the norm of a
/// model's gradient, which a GPU gives in one go.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn sum_of_squares_of(tensors: &[&Tensor]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|t| t.device().is_cuda()) {
        return crate::cuda::reduce::sum_of_squares_of(tensors, OP);
    }
    tensors.iter().map(|t| sum_of_squares(t)).sum()
}

/// How many elements are not exactly 0; NaN counts as not 0.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn count_nonzero(t: &Tensor) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::count_nonzero(t, OP);
    }
    Ok(over_chunks(t, nonzeros)?.into_iter().sum())
}

/// [`count_nonzero`] of many tensors of one device, with one look at the counts at the end: a GPU
/// need not stop for each.
#[derive(Default)]
pub struct NonzeroCounts {
    known: Vec<u64>,
    #[cfg(feature = "cuda")]
    there: crate::cuda::reduce::Counts,
}

impl NonzeroCounts {
    /// Counts one more tensor, which may change or go once this returns.
    ///
    /// # Errors
    /// As [`sum_of_squares`].
    pub fn count(&mut self, t: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if t.device().is_cuda() {
            return self.there.count(t, OP);
        }
        self.known.push(count_nonzero(t)?);
        Ok(())
    }

    /// The counts, in the order of the tensors.
    ///
    /// # Errors
    /// What the work failed with.
    pub fn read(self) -> Result<Vec<u64>> {
        #[cfg(feature = "cuda")]
        if self.known.is_empty() {
            return self.there.read(OP);
        }
        Ok(self.known)
    }
}

/// How many elements of each row of a `[n, width]` tensor are not exactly 0.
///
/// # Errors
/// As [`sum_of_squares`], not two dimensions, or rows too long for counts of 32 bits.
pub fn count_nonzero_rows(t: &Tensor) -> Result<Vec<u32>> {
    let (rows, width) = dims2(t, OP, "t")?;
    if u32::try_from(width).is_err() {
        let what = format!("rows of {width} elements");
        return Err(Error::Unsupported { op: OP, what });
    }
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::count_nonzero_rows(t, (rows, width), OP);
    }
    let mut counts = vec![0; rows];
    if let Some(rows_of_task) = CHUNK.checked_div(width).map(|rows| rows.max(1)) {
        let data = view(t, OP)?;
        counts
            .par_chunks_mut(rows_of_task)
            .zip(data.par_chunks(rows_of_task * width))
            .for_each(|(counts, data)| row_nonzeros(data, width, counts));
    }
    Ok(counts)
}

/// How many elements of each column of a `[n, width]` tensor are not exactly 0: a column of zeros
/// is a neuron that never fired.
///
/// # Errors
/// As [`sum_of_squares`], or not two dimensions.
pub fn count_nonzero_columns(t: &Tensor) -> Result<Vec<u64>> {
    let (_, width) = dims2(t, OP, "t")?;
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::count_nonzero_columns(t, dims2(t, OP, "t")?, OP);
    }
    let mut counts = vec![0; width];
    let data = view(t, OP)?;
    // Columns are cut, not rows, so that each count has one owner.
    counts.par_chunks_mut(1024).enumerate().for_each(|(i, counts)| {
        column_nonzeros(&data, width, i * 1024, counts);
    });
    Ok(counts)
}

/// Whether no element is infinite or NaN.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn all_finite(t: &Tensor) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::all_finite(t, OP);
    }
    Ok(over_chunks(t, finite)?.into_iter().all(|finite| finite))
}

/// The largest magnitude; 0 for no elements, NaN if there is one.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn max_abs(t: &Tensor) -> Result<f32> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::max_abs(t, OP);
    }
    let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    Ok(over_chunks(t, largest)?.into_iter().fold(0.0, larger))
}

/// `t *= factor`.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn scale_in_place(t: &Tensor, factor: f32) -> Result<()> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::scale_in_place(t, factor, OP);
    }
    write_f32(t, OP, |data| {
        data.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|x| *x *= factor));
    })
}

/// `dst += src`, of one shape.
///
/// # Errors
/// As [`sum_of_squares`], shapes that differ, or tensors that share memory.
pub fn add_in_place(dst: &Tensor, src: &Tensor) -> Result<()> {
    ensure_shape(src, OP, "src", dst.dims())?;
    ensure_distinct(OP, dst, &[("src", src)])?;
    #[cfg(feature = "cuda")]
    if dst.device().is_cuda() {
        return crate::cuda::reduce::add_in_place(dst, src, OP);
    }
    let src = view(src, OP)?;
    write_f32(dst, OP, |dst| {
        dst.par_chunks_mut(CHUNK).zip(src.par_chunks(CHUNK)).for_each(|(dst, src)| {
            dst.iter_mut().zip(src).for_each(|(dst, src)| *dst += src);
        });
    })
}

/// Sets every element to `value`.
///
/// # Errors
/// As [`sum_of_squares`].
pub fn fill(t: &Tensor, value: f32) -> Result<()> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::fill(t, value, OP);
    }
    write_f32(t, OP, |data| data.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(value)))
}

/// Counts of elements between `edges`, which ascend: `edges.len() + 1` of them. Count `b` is of the
/// elements `x` with `edges[b-1] <= x < edges[b]`; the first has no lower and the last no upper
/// end. NaN is in none.
///
/// # Errors
/// As [`sum_of_squares`], or edges that do not ascend.
pub fn histogram(t: &Tensor, edges: &[f32]) -> Result<Vec<u64>> {
    if !edges.is_sorted_by(|a, b| a < b) || edges.iter().any(|e| e.is_nan()) {
        return Err(Error::Invalid { op: "histogram", message: "the edges must ascend".into() });
    }
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return crate::cuda::reduce::histogram(t, edges, OP);
    }
    let partial = over_chunks(t, |chunk| {
        let mut counts = vec![0u64; edges.len() + 1];
        for &x in chunk.iter().filter(|x| !x.is_nan()) {
            counts[edges.partition_point(|&edge| edge <= x)] += 1;
        }
        counts
    })?;
    let mut counts = vec![0; edges.len() + 1];
    for part in partial {
        counts.iter_mut().zip(part).for_each(|(all, part)| *all += part);
    }
    Ok(counts)
}

/// `f` of each chunk, in their order.
fn over_chunks<R: Send>(t: &Tensor, f: impl Fn(&[f32]) -> R + Send + Sync) -> Result<Vec<R>> {
    let data = view(t, OP)?;
    Ok(data.par_chunks(CHUNK).map(f).collect())
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn squares(data: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = data.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x) * f64::from(x);
    }
    lanes.into_iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn nonzeros(data: &[f32]) -> u64 {
    // Blocks short enough for counts of 32 bits, which vectorise twice as wide.
    data.chunks(1 << 20).map(|block| u64::from(short_nonzeros(block))).sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn row_nonzeros(data: &[f32], width: usize, counts: &mut [u32]) {
    for (count, row) in counts.iter_mut().zip(data.chunks_exact(width)) {
        *count = short_nonzeros(row);
    }
}

/// Of fewer than 2^32 elements.
#[inline(always)]
fn short_nonzeros(data: &[f32]) -> u32 {
    data.iter().map(|&x| u32::from(x != 0.0)).sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn column_nonzeros(data: &[f32], width: usize, first: usize, counts: &mut [u64]) {
    for row in data.chunks_exact(width.max(1)) {
        for (count, &x) in counts.iter_mut().zip(&row[first..]) {
            *count += u64::from(x != 0.0);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn finite(data: &[f32]) -> bool {
    // No early exit: the usual answer is yes, and a plain count vectorises.
    data.iter().map(|x| u32::from(!x.is_finite())).sum::<u32>() == 0
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn largest(data: &[f32]) -> f32 {
    // Magnitudes order as their bits do, with NaN above infinity.
    f32::from_bits(data.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.61).sin() * 3.0).collect()
    }

    #[test]
    fn sums_and_counts_agree_with_plain_loops_over_odd_lengths() {
        for n in [0, 1, 17, CHUNK - 1, 2 * CHUNK + 3] {
            let mut x = wave(n);
            x.iter_mut().step_by(3).for_each(|x| *x = x.max(0.0));
            let t = tensor(&x);
            let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            assert!((sum_of_squares(&t).unwrap() - squares).abs() <= 1e-12 * squares);
            let nonzero = x.iter().filter(|&&x| x != 0.0).count() as u64;
            assert_eq!(count_nonzero(&t).unwrap(), nonzero);
            assert_eq!(max_abs(&t).unwrap(), x.iter().fold(0f32, |a, b| a.max(b.abs())));
            assert!(all_finite(&t).unwrap());
            let twice = sum_of_squares_of(&[&t, &tensor(&[]), &t]).unwrap();
            assert!((twice - 2.0 * squares).abs() <= 1e-12 * squares);
        }
    }

    #[test]
    fn one_bad_element_is_seen() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, CHUNK, 2 * CHUNK + 2] {
                let mut x = wave(2 * CHUNK + 3);
                x[place] = bad;
                assert!(!all_finite(&tensor(&x)).unwrap());
                let found = max_abs(&tensor(&x)).unwrap();
                assert!(if bad.is_nan() { found.is_nan() } else { found == f32::INFINITY });
            }
        }
    }

    #[test]
    fn rows_and_columns_are_counted() {
        let (rows, width) = (70, 1030);
        let x: Vec<f32> = (0..rows * width)
            .map(|i| if i % 7 == 0 || i % width == 3 { 0.0 } else { 1.5 })
            .collect();
        let t = tensor(&x).reshape((rows, width)).unwrap();
        let count = |cells: &mut dyn Iterator<Item = usize>| cells.filter(|&c| x[c] != 0.0).count();
        let by_row: Vec<u32> =
            (0..rows).map(|r| count(&mut (r * width..(r + 1) * width)) as u32).collect();
        let by_column: Vec<u64> =
            (0..width).map(|c| count(&mut (0..rows).map(|r| r * width + c)) as u64).collect();
        assert_eq!(count_nonzero_rows(&t).unwrap(), by_row);
        assert_eq!(count_nonzero_columns(&t).unwrap(), by_column);
        assert_eq!(by_column[3], 0);
        let empty = Tensor::zeros((4, 0), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(count_nonzero_rows(&empty).unwrap(), [0; 4]);
        assert!(count_nonzero_rows(&tensor(&x)).is_err());
    }

    #[test]
    fn in_place_steps() {
        let x = wave(CHUNK + 9);
        let (t, other) = (tensor(&x), tensor(&x));
        scale_in_place(&t, -2.0).unwrap();
        add_in_place(&t, &other).unwrap();
        let found: Vec<f32> = t.to_vec1().unwrap();
        assert!(found.iter().zip(&x).all(|(found, x)| *found == x * -2.0 + x));
        assert!(add_in_place(&t, &t).is_err());
        fill(&t, f32::NAN).unwrap();
        assert!(t.to_vec1::<f32>().unwrap().iter().all(|x| x.is_nan()));
    }

    #[test]
    fn histogram_has_half_open_bins_and_open_ends() {
        let t = tensor(&[-1.0, 0.0, 0.5, 1.0, 1.0, 7.0, f32::NAN, f32::INFINITY]);
        assert_eq!(histogram(&t, &[0.0, 1.0]).unwrap(), [1, 2, 4]);
        assert_eq!(histogram(&t, &[]).unwrap(), [7]);
        assert!(histogram(&t, &[1.0, 1.0]).is_err());
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let t = tensor(&wave(5 * CHUNK + 11));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_of_squares(&t)).unwrap().to_bits()
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(3));
    }
}
