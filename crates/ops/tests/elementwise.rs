//! Activation functions, the gated product and the L1 gradient.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]

mod oracle;

use candle_core::{DType, Result, Tensor};
use oracle::{Found, Random, bits, check, same_for_any_threads, values};
use proptest::prelude::*;
use relufy_ops::pointwise::Pointwise;
use relufy_ops::{Error, gated, pointwise};

const ALL: [Pointwise; 8] = [
    Pointwise::Identity,
    Pointwise::Silu,
    Pointwise::Gelu,
    Pointwise::GeluTanh,
    Pointwise::Swish { beta: 1.7 },
    Pointwise::Relu,
    Pointwise::ShiftedRelu { shift: 0.4 },
    Pointwise::FatRelu { threshold: 0.3 },
];

/// `x` where `x - from > 0`, as a product with a constant mask.
fn masked(x: &Tensor, from: f64) -> Result<Tensor> {
    x * x.detach().gt(from)?.to_dtype(DType::F64)?
}

fn formula(f: Pointwise, x: &Tensor) -> Result<Tensor> {
    let sigmoid = |x: &Tensor| (x.neg()?.exp()? + 1.0)?.recip();
    match f {
        Pointwise::Identity => x * 1.0,
        Pointwise::Silu => x * sigmoid(x)?,
        Pointwise::Swish { beta } => x * sigmoid(&(x * f64::from(beta))?)?,
        Pointwise::Gelu => (x * 0.5)? * ((x * 0.5f64.sqrt())?.erf()? + 1.0)?,
        Pointwise::GeluTanh => {
            let cubic = (x.powf(3.0)? * 0.044715)?;
            let u = ((x + cubic)? * (2.0 / std::f64::consts::PI).sqrt())?;
            (x * 0.5)? * (u.tanh()? + 1.0)?
        }
        Pointwise::Relu => masked(x, 0.0),
        Pointwise::ShiftedRelu { shift } => masked(&(x - f64::from(shift))?, 0.0),
        Pointwise::FatRelu { threshold } => masked(x, f64::from(threshold)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn activations_agree_with_the_oracle(n in 0usize..5, width in 1usize..70, seed: u64) {
        for f in ALL {
            let mut random = Random::new(seed);
            let (x, dy) = (random.tensor((n, width)), random.tensor((n, width)));
            let y = pointwise::forward(&x, f).unwrap();
            let dx = pointwise::backward(&x, f, &dy).unwrap();
            let in_place = dy.copy().unwrap();
            pointwise::backward_in_place(&x, f, &in_place).unwrap();
            prop_assert_eq!(bits(&in_place), bits(&dx));
            check(&[&x], &dy, &Found { y, gradients: vec![Some(dx)] }, |t| formula(f, &t[0]));
        }
    }

    #[test]
    fn gates_agree_with_the_oracle(n in 0usize..5, ffn in 1usize..50, seed: u64) {
        for f in ALL {
            let mut random = Random::new(seed);
            let (gu, dh) = (random.tensor((n, 2 * ffn)), random.tensor((n, ffn)));
            let y = gated::forward(&gu, f).unwrap();
            let gradients = vec![Some(gated::backward(&gu, f, &dh).unwrap())];
            check(&[&gu], &dh, &Found { y, gradients }, |t| {
                formula(f, &t[0].narrow(1, 0, ffn)?)? * t[0].narrow(1, ffn, ffn)?
            });
            let (dgu, h) = gated::backward_with_output(&gu, f, &dh).unwrap();
            prop_assert_eq!(bits(&dgu), bits(&gated::backward(&gu, f, &dh).unwrap()));
            prop_assert_eq!(bits(&h), bits(&gated::forward(&gu, f).unwrap()));
        }
    }

    #[test]
    fn l1_adds_signs(n in 0usize..5, width in 1usize..70, seed: u64) {
        let mut random = Random::new(seed);
        let h = pointwise::forward(&random.tensor((n, width)), Pointwise::Relu).unwrap();
        let dh = random.tensor((n, width));
        let before = values(&dh);
        let sum = gated::add_l1_gradient(&h, 0.25, &dh).unwrap();
        let h = values(&h);
        prop_assert!((sum - h.iter().sum::<f64>()).abs() <= 1e-6 * sum);
        for ((after, before), h) in values(&dh).iter().zip(before).zip(h) {
            let step = if h > 0.0 { 0.25 } else { 0.0 };
            prop_assert!((after - before - step).abs() < 1e-6);
        }
    }
}

/// Demands a relative error of at most `limit` over a fine grid.
fn assert_exact(f: Pointwise, exact: impl Fn(f64) -> f64, from: f32, to: f32, limit: f64) {
    let n = 200_000;
    let grid: Vec<f32> = (0..n).map(|i| from + (to - from) * i as f32 / n as f32).collect();
    let x = Tensor::from_vec(grid.clone(), n, &candle_core::Device::Cpu).unwrap();
    for (x, y) in grid.into_iter().zip(values(&pointwise::forward(&x, f).unwrap())) {
        let exact = exact(f64::from(x));
        assert!((y - exact).abs() <= limit * exact.abs(), "{f:?} at {x}: {y:e}, not {exact:e}");
    }
}

#[test]
fn activations_are_exact_to_a_few_ulp() {
    assert_exact(Pointwise::Silu, |x| x / (1.0 + (-x).exp()), -80.0, 90.0, 4e-7);
    // The complementary error function, by its continued fraction in the tail and its series elsewhere.
    let upper = |x: f64| {
        if x > 3.0 {
            let tail = (1..60).rev().fold(0.0, |t, k| f64::from(k) / (x + t));
            (-0.5 * x * x).exp() / ((2.0 * std::f64::consts::PI).sqrt() * (x + tail))
        } else {
            let (mut term, mut sum) = (x, x);
            for k in 1..120 {
                term *= x * x / f64::from(2 * k + 1);
                sum += term;
            }
            0.5 - sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
        }
    };
    assert_exact(
        Pointwise::Gelu,
        |x| x * if x > 0.0 { 1.0 - upper(x) } else { upper(-x) },
        -5.0,
        12.0,
        1e-6,
    );
    let tanh = |x: f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        x / (1.0 + (-2.0 * u).exp())
    };
    assert_exact(Pointwise::GeluTanh, tanh, -4.0, 12.0, 2e-6);
    // Where the textbook forms round to 0, so do ours.
    assert_exact(Pointwise::Gelu, |_| 0.0, -12.0, -5.7, 0.0);
    assert_exact(Pointwise::GeluTanh, |_| 0.0, -12.0, -5.7, 0.0);
}

#[test]
fn kinks_have_no_slope() {
    let kink = |f, at: f32| {
        let x = Tensor::new(&[at], &candle_core::Device::Cpu).unwrap();
        let dy = Tensor::new(&[3f32], &candle_core::Device::Cpu).unwrap();
        bits(&pointwise::backward(&x, f, &dy).unwrap())
    };
    assert_eq!(kink(Pointwise::Relu, 0.0), [0]);
    assert_eq!(kink(Pointwise::Relu, -0.0), [0]);
    assert_eq!(kink(Pointwise::ShiftedRelu { shift: 0.5 }, 0.5), [0]);
    assert_eq!(kink(Pointwise::FatRelu { threshold: 0.5 }, 0.5), [0]);
}

#[test]
fn values_at_the_ends() {
    let at = |f, x: f32| {
        let x = Tensor::new(&[x], &candle_core::Device::Cpu).unwrap();
        pointwise::forward(&x, f).unwrap().to_vec1::<f32>().unwrap()[0]
    };
    for f in ALL {
        assert!(at(f, f32::NAN).is_nan(), "{f:?} hides a NaN");
        assert_eq!(at(f, 1e30), 1e30, "{f:?}");
        if f != Pointwise::Identity {
            assert_eq!(at(f, -1e4), 0.0, "{f:?}");
        }
    }
    assert_eq!(at(Pointwise::FatRelu { threshold: 0.5 }, 0.5), 0.5);
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut random = Random::new(2);
    let (gu, dh) = (random.tensor((90, 1502)), random.tensor((90, 751)));
    same_for_any_threads(|| {
        let l1 = dh.copy().unwrap();
        let h = gated::forward(&gu, Pointwise::Silu).unwrap();
        let sum = gated::add_l1_gradient(&h, 0.1, &l1).unwrap();
        let sum = Tensor::new(&[sum as f32], &candle_core::Device::Cpu).unwrap();
        vec![gated::backward(&gu, Pointwise::Gelu, &dh).unwrap(), h, l1, sum]
    });
}

#[test]
fn says_what_does_not_fit() {
    let mut random = Random::new(3);
    let odd = random.tensor((2, 5));
    assert!(matches!(gated::forward(&odd, Pointwise::Relu), Err(Error::Indivisible { .. })));
    let dy = random.tensor((5, 2));
    let dx = pointwise::backward(&odd, Pointwise::Relu, &dy);
    assert!(matches!(dx, Err(Error::Shape { .. })));
    let aliased = pointwise::backward_in_place(&odd, Pointwise::Relu, &odd);
    assert!(matches!(aliased, Err(Error::Aliased { .. })));
}
