//! The oracle: an operation's f32 forward and backward against candle's autograd in f64 on a plain,
//! differentiable formula, and against central finite differences of the same formula.
//!
//! The formula must avoid what candle differentiates silently wrongly: `relu` at 0, and its fused
//! `softmax_last_dim`, `rms_norm`, `layer_norm`, `rope`.
#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure is the test's failure")]

use candle_core::{DType, Device, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How far f32 may be from f64, relative to the norm of the whole tensor.
pub const TOLERANCE: f64 = 2e-6;

/// Fresh random numbers.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in -2..2, the same each time for one seed.
    pub fn tensor(&mut self, shape: impl Into<candle_core::Shape>) -> Tensor {
        let shape = shape.into();
        let v: Vec<f32> =
            (0..shape.elem_count()).map(|_| self.0.random_range(-2.0f32..2.0)).collect();
        Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
    }

    pub fn ids(&mut self, n: usize, below: u32) -> Vec<u32> {
        (0..n).map(|_| self.0.random_range(0..below)).collect()
    }
}

/// A tensor of NaN: whoever overwrites it must write everything.
pub fn poison(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::full(f32::NAN, shape.into(), &Device::Cpu).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Demands `|found - expected| <= tolerance |expected|` by norm, and the same shape.
#[track_caller]
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_close_at(what, found, expected, tolerance, 0.0);
}

/// The same, relative to at least `least`: what remains of terms of that size that cancel has their
/// rounding errors.
#[track_caller]
fn assert_close_at(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64, least: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}: shape");
    let (found, expected) = (values(found), values(expected));
    let off: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    let (off, scale) = (norm(&off), norm(&expected).max(least));
    // Written so that a NaN fails.
    assert!(off <= tolerance * scale + 1e-30, "{what}: off by {off:e} of {scale:e}");
}

/// What an operation gave: its output, and the gradients of those inputs that have one.
pub struct Found {
    pub y: Tensor,
    pub gradients: Vec<Option<Tensor>>,
}

/// Compares an operation with `formula` of the same inputs; `dy` is the gradient of the output.
#[track_caller]
pub fn check(
    inputs: &[&Tensor],
    dy: &Tensor,
    found: &Found,
    formula: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) {
    if dy.elem_count() == 0 {
        // candle cannot reduce empty tensors; and there is nothing to compare but shapes and zeros.
        assert_eq!(found.y.dims(), dy.dims());
        for (input, gradient) in inputs.iter().zip(&found.gradients) {
            let Some(gradient) = gradient else { continue };
            assert_eq!(gradient.dims(), input.dims());
            assert!(values(gradient).iter().all(|&g| g == 0.0), "a gradient from nothing");
        }
        return;
    }
    let dy = dy.to_dtype(DType::F64).unwrap();
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(&t.to_dtype(DType::F64).unwrap()).unwrap())
        .collect();
    let at: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = formula(&at).unwrap();
    assert_close("forward", &found.y, &y, TOLERANCE);
    let loss = |at: &[Tensor]| (formula(at)? * &dy)?.sum_all();
    let store = loss(&at).unwrap().backward().unwrap();
    for (i, gradient) in found.gradients.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        let zeros = at[i].zeros_like().unwrap();
        let expected = store.get(&at[i]).unwrap_or(&zeros);
        let what = format!("gradient {i} against autograd");
        assert_close_at(&what, gradient, expected, 4.0 * TOLERANCE, norm(&values(&dy)));
        differences(i, gradient, &at, &loss);
    }
}

/// Compares a gradient with central differences of `loss` along random directions.
#[track_caller]
fn differences(
    i: usize,
    gradient: &Tensor,
    at: &[Tensor],
    loss: &impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
) {
    // Where a kink lies within a step, a shorter one tells.
    const STEPS: [f64; 2] = [1e-6, 1e-8];
    let mut random = Random::new(i as u64);
    for _ in 0..3 {
        let way = random.tensor(at[i].shape()).to_dtype(DType::F64).unwrap();
        let moved = |step: f64| {
            let mut at = at.to_vec();
            at[i] = (&at[i] + (&way * step).unwrap()).unwrap().detach();
            loss(&at).unwrap().to_scalar::<f64>().unwrap()
        };
        let slopes = STEPS.map(|step| (moved(step) - moved(-step)) / (2.0 * step));
        let (gradient, way) = (values(gradient), values(&way));
        let ours: f64 = gradient.iter().zip(&way).map(|(g, w)| g * w).sum();
        let bound = 1e-5 * norm(&gradient) * norm(&way) + 1e-7;
        assert!(
            slopes.iter().any(|slope| (ours - slope).abs() <= bound),
            "gradient {i}: {ours} along a line, {slopes:?} measured"
        );
    }
}

/// Runs `f` in pools of 1, 2 and 3 threads and demands the same bits.
#[track_caller]
pub fn same_for_any_threads(f: impl Fn() -> Vec<Tensor> + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| f().iter().map(bits).collect::<Vec<_>>())
    };
    let alone = run(1);
    for threads in [2, 3] {
        assert!(run(threads) == alone, "{threads} threads give other bits than one");
    }
}
