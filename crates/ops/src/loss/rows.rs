//! One row of logits: softmax, loss, and the gradient in its place.

use multiversion::multiversion;

use crate::math::{exp, fold};
use crate::vmath::{self, LANES};

/// From a product `h W^T` to a logit.
#[derive(Clone, Copy)]
pub(super) struct Adjust<'a> {
    pub(super) bias: Option<&'a [f32]>,
    pub(super) softcap: Option<f32>,
}

/// What the teacher says about a row.
pub(super) struct Lesson<'a> {
    /// Its logits, adjusted.
    pub(super) logits: &'a [f32],
    pub(super) temperature: f32,
    pub(super) weight: f32,
}

/// Adds the bias, caps, and returns the largest logit.
#[inline(always)]
fn adjust(row: &mut [f32], by: Adjust<'_>) -> f32 {
    if let Some(bias) = by.bias {
        row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
    match by.softcap {
        None => vmath::map_max(row, |x, _| x),
        Some(cap) => vmath::map_max(row, |x, _| cap * vmath::tanh(x / cap)),
    }
}

/// Adds the bias and caps.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn adjust_row(row: &mut [f32], by: Adjust<'_>) {
    adjust(row, by);
}

/// Cross-entropy of a row and its divergence from the teacher. With `scale`, the row becomes the
/// gradient of `scale` times the objective; else its content is lost.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn loss(
    row: &mut [f32],
    by: Adjust<'_>,
    target: usize,
    lesson: Option<&Lesson<'_>>,
    scale: Option<f32>,
) -> (f64, f64) {
    let max = adjust(row, by);
    let at_target = row[target];
    if by.softcap.is_none() && lesson.is_none() {
        // The exponentials become the gradient where they stand.
        let sum = vmath::map_sum(row, |x| exp(x - max));
        if let Some(scale) = scale {
            let factor = scale / sum;
            row.iter_mut().for_each(|x| *x *= factor);
            row[target] -= scale;
        }
        return (f64::from(max) + f64::from(sum).ln() - f64::from(at_target), 0.0);
    }
    let lse = max + sum_exp(row, 1.0, max).ln();
    let share = 1.0 - lesson.map_or(0.0, |lesson| lesson.weight);
    let slope = |x: f32| by.softcap.map_or(1.0, |cap| 1.0 - (x / cap) * (x / cap));
    let mut kl = 0.0;
    match (lesson, scale) {
        (Some(lesson), scale) => kl = learn(row, lesson, (max, lse), scale, slope),
        (None, Some(scale)) => {
            row.iter_mut().for_each(|x| *x = scale * exp(*x - lse) * slope(*x));
        }
        (None, None) => {}
    }
    if let Some(scale) = scale {
        row[target] -= scale * share * slope(at_target);
    }
    (f64::from(lse) - f64::from(at_target), kl)
}

/// The divergence from the teacher; with `scale` the row becomes the gradient, but for the target's
/// `-1`.
///
/// With `a`, `b` the log-probabilities of teacher and student at temperature T: `KL = sum e^a (a -
/// b)`, and its gradient in the logits is `(e^b - e^a) / T`.
#[inline(always)]
fn learn(
    row: &mut [f32],
    lesson: &Lesson<'_>,
    (max, lse): (f32, f32),
    scale: Option<f32>,
    slope: impl Fn(f32) -> f32,
) -> f64 {
    let inverse = 1.0 / lesson.temperature;
    let taught_max =
        lesson.logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let log_sum = |row: &[f32], max: f32| max * inverse + sum_exp(row, inverse, max).ln();
    let (student, teacher) = (log_sum(row, max), log_sum(lesson.logits, taught_max));
    let own = scale.unwrap_or(0.0) * (1.0 - lesson.weight);
    let learnt = scale.unwrap_or(0.0) * lesson.weight * lesson.temperature;
    let mut lanes = [0.0f32; LANES];
    let cell = |lane: &mut f32, x: &mut f32, t: f32| {
        let (a, b) = (t * inverse - teacher, *x * inverse - student);
        let p = exp(a);
        *lane += if p > 0.0 { p * (a - b) } else { 0.0 };
        *x = (own * exp(*x - lse) + learnt * (exp(b) - p)) * slope(*x);
    };
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let (taught_chunks, taught_rest) = lesson.logits.as_chunks::<LANES>();
    for (x, t) in chunks.iter_mut().zip(taught_chunks) {
        for i in 0..LANES {
            cell(&mut lanes[i], &mut x[i], t[i]);
        }
    }
    for ((lane, x), t) in lanes.iter_mut().zip(rest).zip(taught_rest) {
        cell(lane, x, *t);
    }
    f64::from(fold(lanes))
}

/// `sum exp((x - max) * factor)`.
#[inline(always)]
fn sum_exp(row: &[f32], factor: f32, max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += exp((chunk[i] - max) * factor);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += exp((x - max) * factor);
    }
    fold(lanes)
}

/// What softmax needs of a row of logits.
#[derive(Clone, Copy)]
pub(super) struct Summary {
    /// The largest logit.
    pub(super) max: f32,
    /// The logarithm of the sum of exponentials.
    pub(super) lse: f32,
}

/// Adjusts a row of products, and sums it up.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn summarise(row: &mut [f32], by: Adjust<'_>) -> Summary {
    let max = adjust(row, by);
    Summary { max, lse: max + sum_exp(row, 1.0, max).ln() }
}

/// The index of the first largest element; `None` for an empty row and one that holds a NaN.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn first_largest(row: &mut [f32], by: Adjust<'_>) -> Option<usize> {
    let max = adjust(row, by);
    // No early exit: a plain count vectorises.
    let nans = row.iter().map(|x| u32::from(x.is_nan())).sum::<u32>();
    if nans > 0 { None } else { find(row, max) }
}

/// The index of the first element that equals `x`.
#[inline(always)]
pub(super) fn find(row: &[f32], x: f32) -> Option<usize> {
    let (chunks, _) = row.as_chunks::<LANES>();
    // A chunk at a time, whose comparisons vectorise.
    let there = |chunk: &[f32; LANES]| chunk.iter().fold(false, |hit, y| hit | (*y == x));
    let from = chunks.iter().position(there).unwrap_or(chunks.len()) * LANES;
    row[from..].iter().position(|y| *y == x).map(|at| from + at)
}

/// `sums[c] += sum over rows of cells[first + c]`, rows `width` apart, in their order.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn add_columns(sums: &mut [f32], cells: &[f32], width: usize, first: usize) {
    for row in cells.chunks_exact(width) {
        sums.iter_mut().zip(&row[first..]).for_each(|(sum, x)| *sum += x);
    }
}
