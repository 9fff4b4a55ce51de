//! What the GPU tests share: the device, fresh random tensors, and how close is close.
#![allow(dead_code, reason = "each test uses its part")]

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use candle_core::{DType, Device, Shape, Tensor};
use libtest_mimic::{Failed, Trial};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tests by name.
pub type Trials = Vec<(&'static str, fn())>;

/// The element types of a GPU's tensors, with how far a result may be from the CPU's f32, relative
/// by norm.
pub const TYPES: [(DType, f64); 2] = [(DType::F32, 1e-5), (DType::BF16, 1e-2)];

/// The first GPU, opened once.
pub fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| relufy_ops::device::open("cuda").unwrap())
}

/// Held by tests that capture the stream's work: nobody else may queue any meanwhile.
static ALONE: RwLock<()> = RwLock::new(());

/// Runs a test on poisoned memory: what an operation leaves unwritten is NaN. One whose name says
/// `graph` runs alone.
pub fn trial((name, run): (&'static str, fn())) -> Trial {
    Trial::test(name, move || {
        let alone = name.contains("graph");
        let _alone = alone.then(|| ALONE.write().unwrap_or_else(PoisonError::into_inner));
        let _beside = (!alone).then(|| ALONE.read().unwrap_or_else(PoisonError::into_inner));
        poison();
        std::panic::catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Failed::from(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked"))
        })
    })
}

/// Below which power of two [`poison`]'s pieces stay: less for trials of little memory.
pub static POISONED: AtomicU32 = AtomicU32::new(26);

/// Fills the pool's free memory with NaN, in pieces of several sizes.
pub fn poison() {
    let pieces: Vec<Tensor> = (8..POISONED.load(Ordering::Relaxed))
        .flat_map(|power| [power; 4])
        .map(|power| Tensor::full(f32::NAN, 1usize << power, gpu()).unwrap())
        .collect();
    drop(pieces);
}

/// Fresh random numbers.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in -2..2 and exact in bf16, on the CPU in f32.
    pub fn tensor(&mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let v: Vec<f32> = (0..shape.elem_count())
            .map(|_| half::bf16::from_f32(self.0.random_range(-2.0f32..2.0)).to_f32())
            .collect();
        Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
    }

    pub fn ids(&mut self, n: usize, below: u32) -> Vec<u32> {
        (0..n).map(|_| self.0.random_range(0..below)).collect()
    }
}

/// The tensor on the GPU, in another type.
pub fn on_gpu(t: &Tensor, dtype: DType) -> Tensor {
    t.to_dtype(dtype).unwrap().to_device(gpu()).unwrap()
}

/// As [`on_gpu`], but one element into its memory, where no vector may begin.
pub fn on_gpu_at_an_odd_place(t: &Tensor, dtype: DType) -> Tensor {
    let first = Tensor::full(f32::NAN, 1, &Device::Cpu).unwrap().to_dtype(t.dtype()).unwrap();
    let flat = t.flatten_all().unwrap();
    let there = on_gpu(&Tensor::cat(&[&first, &flat], 0).unwrap(), dtype);
    there.narrow(0, 1, flat.elem_count()).unwrap().reshape(t.shape()).unwrap()
}

/// NaN on the GPU: whoever overwrites it must write everything.
pub fn nan(shape: impl Into<Shape>, dtype: DType) -> Tensor {
    Tensor::full(f32::NAN, shape, gpu()).unwrap().to_dtype(dtype).unwrap()
}

/// The numbers of a tensor on any device.
pub fn values(t: &Tensor) -> Vec<f64> {
    let host = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    host.flatten_all().unwrap().to_vec1().unwrap()
}

/// `|found - expected| / |expected|`.
pub fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let square = |x: f64| x * x;
    let far: f64 = found.iter().zip(&expected).map(|(f, e)| square(f - e)).sum();
    let size: f64 = expected.iter().copied().map(square).sum();
    (far / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// Demands that `found` is within `tolerance` of `expected`, relative by norm; NaN is never close.
#[track_caller]
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let distance = distance(found, expected);
    assert!(distance <= tolerance, "{what}: {distance:.2e} from the CPU, {tolerance:.0e} allowed");
}

/// Demands the same bits.
#[track_caller]
pub fn assert_same(what: &str, one: &Tensor, other: &Tensor) {
    let bits = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert!(bits(one) == bits(other), "{what}: two runs differ");
}
