//! What the loops over rows of scores and logits share: `tanh`, and sums and maxima in lanes.
//!
//! All of it is inlined into loops compiled per instruction set by the `multiversion` crate.

use crate::math::{exp, fold};

/// Elements that loops with a sum or a maximum carry side by side: LLVM may not reorder float
/// additions, so each lane has a sum of its own, and the lanes are added in a fixed order.
pub(crate) const LANES: usize = 16;

/// `tanh(x)` to about 2e-7 relative.
///
/// `1 - 2 / (e^2x + 1)` loses digits near 0, where an odd polynomial (Cephes' `tanhf`) takes its
/// place.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    let far = far.copysign(x);
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    for c in [2.063_909e-2, -5.373_971_6e-2, 0.133_314_42, -0.333_332_8] {
        p = z * p + c;
    }
    let near = x * z * p + x;
    if x.abs() < 0.625 { near } else { far }
}

/// `a . b`.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += a * b;
    }
    fold(lanes)
}

/// Replaces each element by `f(element, index)` and returns the largest; minus infinity if there
/// are none. A NaN may be passed over: it shows in the sum that follows.
#[inline(always)]
pub(crate) fn map_max(row: &mut [f32], f: impl Fn(f32, usize) -> f32) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let whole = chunks.len() * LANES;
    for (c, chunk) in chunks.iter_mut().enumerate() {
        for i in 0..LANES {
            chunk[i] = f(chunk[i], c * LANES + i);
            lanes[i] = larger(chunk[i], lanes[i]);
        }
    }
    for (i, x) in rest.iter_mut().enumerate() {
        *x = f(*x, whole + i);
        lanes[i] = larger(*x, lanes[i]);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// Replaces each element by `f(element)` and returns the sum, in a fixed order.
#[inline(always)]
pub(crate) fn map_sum(row: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = f(chunk[i]);
            lanes[i] += chunk[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = f(*x);
        *lane += *x;
    }
    fold(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative error against f64 over a grid that crosses every binade of the result.
    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, from: f32, to: f32) -> f64 {
        (0..=400_000)
            .map(|i| from + (to - from) * (i as f32 / 400_000.0))
            .map(|x| ((f64::from(f(x)) - exact(f64::from(x))) / exact(f64::from(x))).abs())
            .filter(|e| e.is_finite())
            .fold(0.0, f64::max)
    }

    #[test]
    fn tanh_is_exact_to_a_few_ulp() {
        assert!(worst(tanh, f64::tanh, -12.0, 12.0) < 2.5e-7);
        assert!(worst(tanh, f64::tanh, -1e-3, 1e-3) < 1e-7);
        assert!(tanh(f32::NAN).is_nan());
        assert_eq!((tanh(50.0), tanh(-50.0), tanh(0.0)), (1.0, -1.0, 0.0));
        assert_eq!(tanh(f32::INFINITY), 1.0);
    }

    #[test]
    fn maximum_and_sums_take_every_element() {
        for len in [0, 1, 15, 16, 17, 37] {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let sum: f32 = a.iter().sum();
            let max = a.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(map_max(&mut a.clone(), |x, _| x), max);
            assert_eq!(map_max(&mut a.clone(), |x, i| x - i as f32) == 0.0, len > 0);
            assert_eq!(map_sum(&mut a.clone(), |x| x + 1.0), sum + len as f32);
            assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
        }
    }
}
