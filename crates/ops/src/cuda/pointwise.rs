//! Activation functions on a GPU.

use crate::pointwise::Pointwise;

/// The name that entry points have for a curve, and the curve's parameter (0 where it has none).
pub(crate) fn curve_name(f: Pointwise) -> (&'static str, f32) {
    match f {
        Pointwise::Identity => ("identity", 0.0),
        Pointwise::Silu => ("silu", 0.0),
        Pointwise::Gelu => ("gelu", 0.0),
        Pointwise::GeluTanh => ("gelu_tanh", 0.0),
        Pointwise::Swish { beta } => ("swish", beta),
        Pointwise::Relu => ("relu", 0.0),
        Pointwise::ShiftedRelu { shift } => ("shifted_relu", shift),
        Pointwise::FatRelu { threshold } => ("fat_relu", threshold),
    }
}

/// The number that kernels' `AnyCurve` has for a curve, and the curve's parameter.
pub(crate) fn curve_code(f: Pointwise) -> (i32, f32) {
    let code = match f {
        Pointwise::Identity => 0,
        Pointwise::Silu => 1,
        Pointwise::Gelu => 2,
        Pointwise::GeluTanh => 3,
        Pointwise::Swish { .. } => 4,
        Pointwise::Relu => 5,
        Pointwise::ShiftedRelu { .. } => 6,
        Pointwise::FatRelu { .. } => 7,
    };
    (code, curve_name(f).1)
}
