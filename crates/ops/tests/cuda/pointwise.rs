//! Activation functions.

use candle_core::{Device, Tensor};
use relufy_ops::pointwise::{self, Pointwise};

use crate::common::{
    Random, TYPES, Trials, assert_close, assert_same, on_gpu, on_gpu_at_an_odd_place, values,
};

pub fn trials() -> Trials {
    vec![
        ("pointwise_matches_the_cpu", || matches_the_cpu(&[1, 7, 2048, 3 * 4096, 5 * 4096 + 13])),
        ("pointwise_keeps_zeros_and_nan", keeps_zeros_and_nan),
        ("pointwise_refuses_what_does_not_fit", refuses_what_does_not_fit),
        ("small_pointwise", || matches_the_cpu(&[7, 2048])),
    ]
}

pub const ALL: [Pointwise; 8] = [
    Pointwise::Identity,
    Pointwise::Silu,
    Pointwise::Gelu,
    Pointwise::GeluTanh,
    Pointwise::Swish { beta: 1.7 },
    Pointwise::Relu,
    Pointwise::ShiftedRelu { shift: 0.4 },
    Pointwise::FatRelu { threshold: 0.3 },
];

fn matches_the_cpu(sizes: &[usize]) {
    for (seed, &n) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (x, dy) = (random.tensor(n), random.tensor(n));
        for f in ALL {
            let y = pointwise::forward(&x, f).unwrap();
            let dx = pointwise::backward(&x, f, &dy).unwrap();
            for (dtype, tolerance) in TYPES {
                for place in [on_gpu, on_gpu_at_an_odd_place] {
                    let what = format!("{f:?} {n} {dtype:?}");
                    let (x, dy) = (place(&x, dtype), place(&dy, dtype));
                    assert_close(&what, &pointwise::forward(&x, f).unwrap(), &y, tolerance);
                    let found = pointwise::backward(&x, f, &dy).unwrap();
                    assert_close(&what, &found, &dx, tolerance);
                    pointwise::backward_in_place(&x, f, &dy).unwrap();
                    assert_same(&what, &dy, &found);
                    let none = x.narrow(0, 0, 0).unwrap();
                    assert_eq!(pointwise::forward(&none, f).unwrap().dims(), [0]);
                }
            }
        }
    }
}

/// Zeros, infinities and NaN come out where they do on the CPU: densities count exact zeros.
fn keeps_zeros_and_nan() {
    let mut x: Vec<f32> = (-200..200).map(|i| i as f32 * 0.1875).collect();
    x.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e30, -1e30, 1e10, -1e10]);
    // The kinks themselves, of which bf16 has its own.
    x.extend([0.4, 0.3]);
    let x = Tensor::from_vec(x, 410, &Device::Cpu).unwrap();
    let dy = x.ones_like().unwrap();
    for (dtype, tolerance) in TYPES {
        let x = on_gpu(&x, dtype);
        let rounded = x.to_device(&Device::Cpu).unwrap().to_dtype(candle_core::DType::F32).unwrap();
        for f in ALL {
            let found = [
                pointwise::forward(&x, f).unwrap(),
                pointwise::backward(&x, f, &on_gpu(&dy, dtype)).unwrap(),
            ];
            let expected = [
                pointwise::forward(&rounded, f).unwrap(),
                pointwise::backward(&rounded, f, &dy).unwrap(),
            ];
            for (which, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let triples = values(&rounded).into_iter().zip(values(found)).zip(values(expected));
                for ((x, found), expected) in triples {
                    // A derivative is a sum that may cancel.
                    let least = if which == 0 { 1e-9 } else { 0.1 };
                    let near = (found - expected).abs() <= tolerance * expected.abs().max(least);
                    let alike = found == expected || (found.is_nan() && expected.is_nan());
                    assert!(near || alike, "{f:?} {which} at {x}: {found:e}, not {expected:e}");
                    let zero = found == 0.0 && which == 0;
                    assert!(!zero || expected == 0.0, "{f:?} at {x}: 0, not {expected:e}");
                }
            }
        }
    }
}

fn refuses_what_does_not_fit() {
    let x = on_gpu(&Random::new(1).tensor((4, 6)), candle_core::DType::F32);
    let half = x.to_dtype(candle_core::DType::BF16).unwrap();
    assert!(pointwise::backward(&x, Pointwise::Silu, &half).is_err());
    assert!(pointwise::backward_in_place(&x, Pointwise::Silu, &x).is_err());
    assert!(pointwise::forward(&x.t().unwrap(), Pointwise::Silu).is_err());
    let wide = x.to_dtype(candle_core::DType::F64).unwrap();
    assert!(pointwise::forward(&wide, Pointwise::Silu).is_err());
}
