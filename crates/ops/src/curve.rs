//! The activation functions one element at a time, in a form that vectorises inside any loop.

use crate::math::{normal, sigmoid};

/// A scalar function and its derivative.
pub(crate) trait Curve: Copy + Send + Sync {
    /// `f(x)`.
    fn value(self, x: f32) -> f32;

    /// `f(x)` and `f'(x) dy`; 0 at a kink.
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32);
}

/// `x`.
#[derive(Clone, Copy)]
pub(crate) struct Identity;

impl Curve for Identity {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        (x, dy)
    }
}

/// `x sigmoid(x)`; `f' = s (1 + x (1 - s))`.
#[derive(Clone, Copy)]
pub(crate) struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        let s = sigmoid(x);
        let y = x * s;
        (y, dy * (s + y * (1.0 - s)))
    }
}

/// `x sigmoid(beta x)`; `f' = s + beta x s (1 - s)`.
#[derive(Clone, Copy)]
pub(crate) struct Swish(pub(crate) f32);

impl Curve for Swish {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * sigmoid(self.0 * x)
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        let s = sigmoid(self.0 * x);
        let y = x * s;
        (y, dy * (s + self.0 * y * (1.0 - s)))
    }
}

/// The smallest `p` for which `1 + (2p - 1)` is not 0 in f32. GELU's textbook forms
/// `x/2 (1 + erf)` and `x/2 (1 + tanh)` are exactly 0 below it, in every framework: part of
/// a dense model's density, so it is kept, although `p` itself is known further.
const SMALLEST_SHARE: f32 = 1.490_116_1e-8; // 2^-26

/// `share`, or 0 where the textbook form would have rounded it away.
#[inline(always)]
fn as_rounded(share: f32) -> f32 {
    if share <= SMALLEST_SHARE { 0.0 } else { share }
}

/// `x Phi(x)` with the normal distribution `Phi`; `f' = Phi(x) + x phi(x)`.
#[derive(Clone, Copy)]
pub(crate) struct Gelu;

impl Curve for Gelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * as_rounded(normal(x).0)
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        let (up_to, density) = normal(x);
        (x * up_to, dy * (up_to + x * density))
    }
}

/// `x/2 (1 + tanh u)`, `u = sqrt(2/pi) (x + 0.044715 x^3)`, written as `x sigmoid(2u)`.
#[derive(Clone, Copy)]
pub(crate) struct GeluTanh;

/// `2 sqrt(2/pi)`, and the same times 0.044715.
const TWO_U: f32 = 1.595_769;
const TWO_U_CUBIC: f32 = 0.071_354_82;

impl Curve for GeluTanh {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * as_rounded(sigmoid(x * (TWO_U + TWO_U_CUBIC * x * x)))
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        let cubic = TWO_U_CUBIC * x * x;
        let s = sigmoid(x * (TWO_U + cubic));
        let y = x * s;
        (y, dy * (s + y * (1.0 - s) * (TWO_U + 3.0 * cubic)))
    }
}

/// `max(x, 0)`; a NaN stays one.
#[derive(Clone, Copy)]
pub(crate) struct Relu;

impl Curve for Relu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        if x <= 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        (self.value(x), if x <= 0.0 { 0.0 } else { dy })
    }
}

/// `max(x - shift, 0)` (ReLU Strikes Back, section 5.3).
#[derive(Clone, Copy)]
pub(crate) struct ShiftedRelu(pub(crate) f32);

impl Curve for ShiftedRelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        Relu.value(x - self.0)
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        Relu.value_and_pull(x - self.0, dy)
    }
}

/// `x` where `x >= threshold`, else 0 (FATReLU, as in ProSparse).
#[derive(Clone, Copy)]
pub(crate) struct FatRelu(pub(crate) f32);

impl Curve for FatRelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        if x < self.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn value_and_pull(self, x: f32, dy: f32) -> (f32, f32) {
        (self.value(x), if x <= self.0 { 0.0 } else { dy })
    }
}

/// Runs `$body` with `$curve` bound to the concrete curve of a [`crate::pointwise::Pointwise`].
macro_rules! with_curve {
    ($f:expr, $curve:ident => $body:expr) => {{
        use $crate::curve as curves;
        use $crate::pointwise::Pointwise as P;
        match $f {
            P::Identity => {
                let $curve = curves::Identity;
                $body
            }
            P::Silu => {
                let $curve = curves::Silu;
                $body
            }
            P::Gelu => {
                let $curve = curves::Gelu;
                $body
            }
            P::GeluTanh => {
                let $curve = curves::GeluTanh;
                $body
            }
            P::Swish { beta } => {
                let $curve = curves::Swish(beta);
                $body
            }
            P::Relu => {
                let $curve = curves::Relu;
                $body
            }
            P::ShiftedRelu { shift } => {
                let $curve = curves::ShiftedRelu(shift);
                $body
            }
            P::FatRelu { threshold } => {
                let $curve = curves::FatRelu(threshold);
                $body
            }
        }
    }};
}
pub(crate) use with_curve;
