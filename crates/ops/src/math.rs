//! Elementary functions that the compiler turns into vector code: no branch, no table, no call.
//!
//! Each is a plain `#[inline(always)]` function, so that the multiversioned loops around it compile it
//! for their own instruction set. No fused multiply-add is asked for: without the instruction it
//! would be a library call. The coefficients are Chebyshev fits made for this file.

/// Below this `exp` is 0 and above [`EXP_MAX`] infinite.
const EXP_MIN: f32 = -86.6;
const EXP_MAX: f32 = 88.72;
/// Adding and subtracting this (1.5 * 2^23) rounds to the nearest integer.
const ROUND: f32 = 12_582_912.0;
/// `ln 2` in two parts; the first has few enough bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x`, within 1.5 units in the last place; 0 below -86.6, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    exp_sum(x, 0.0)
}

/// `e^(x + low)` for a small correction `low` that `x + low` would round away.
#[inline(always)]
fn exp_sum(x: f32, low: f32) -> f32 {
    let y = if x < EXP_MIN { EXP_MIN } else { x };
    let y = if y > EXP_MAX { EXP_MAX } else { y };
    let shifted = y * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = y - n * LN2_HIGH - n * LN2_LOW + low;
    let p = 1.392_625_1e-3;
    let p = p * r + 8.363_233e-3;
    let p = p * r + 4.166_655_4e-2;
    let p = p * r + 1.666_657_7e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2^(n-1): at the upper end 2^n itself would not be finite.
    let half = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(126);
    let e = p * f32::from_bits((half as u32) << 23) * 2.0;
    let e = if x < EXP_MIN { 0.0 } else { e };
    if x > EXP_MAX { f32::INFINITY } else { e }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The normal distribution: its probability up to `x` and its density at `x`.
///
/// The upper tail is `t P(t) e^(-x^2/2)` with `t = 1 / (1 + 0.3 |x|)`.
#[inline(always)]
pub(crate) fn normal(x: f32) -> (f32, f32) {
    let a = x.abs();
    // The square in two parts: rounding it would cost a large argument its last digits.
    let high = f32::from_bits(a.to_bits() & 0xffff_f000);
    let e = exp_sum(-0.5 * high * high, -0.5 * (a - high) * (a + high));
    let t = 1.0 / (1.0 + 0.3 * a);
    let s = 2.0 * t - 1.0;
    let p = 6.441_181e-6;
    let p = p * s + 2.757_603_5e-4;
    let p = p * s - 5.138_064e-4;
    let p = p * s - 2.434_076e-3;
    let p = p * s + 1.801_513_6e-3;
    let p = p * s + 2.776_326_5e-2;
    let p = p * s + 8.655_1e-2;
    let p = p * s + 1.645_793_3e-1;
    let p = p * s + 2.219_706e-1;
    let tail = t * p * e;
    // 1 / sqrt(2 pi)
    (if x > 0.0 { 1.0 - tail } else { tail }, 0.398_942_3 * e)
}

/// How many sums run side by side: two AVX-512 registers.
pub(crate) const LANES: usize = 32;

/// Adds `term(a[i], b[i])` over equally long slices in a fixed order, in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (blocks_a, rest_a) = a.as_chunks::<LANES>();
    let (blocks_b, rest_b) = b.as_chunks::<LANES>();
    // Arrays and an index, not iterators: in this form the lanes stay in registers.
    for (a, b) in blocks_a.iter().zip(blocks_b) {
        for i in 0..LANES {
            lanes[i] += term(a[i], b[i]);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(rest_a).zip(rest_b) {
        *lane += term(a, b);
    }
    fold(lanes)
}

/// Adds `term(a[i])` in a fixed order, in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum1(a: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    sum2(a, a, |a, _| term(a))
}

/// The sum of partial sums, a power of two of them, pairwise: always in the same order.
#[inline(always)]
pub(crate) fn fold<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
