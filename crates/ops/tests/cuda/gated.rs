//! The gated product and the L1 gradient.

use candle_core::{DType, Tensor};
use relufy_ops::gated;
use relufy_ops::pointwise::Pointwise;

use crate::common::{
    Random, TYPES, Trials, assert_close, assert_same, gpu, on_gpu, on_gpu_at_an_odd_place,
};
use crate::pointwise::ALL;

pub fn trials() -> Trials {
    vec![
        ("gated_matches_the_cpu", || matches_the_cpu(&SIZES)),
        ("gated_gives_its_output_again", || gives_its_output_again(&SIZES)),
        ("gated_adds_the_l1_gradient", || adds_the_l1_gradient(&[(1, 3), (64, 128), (129, 1031)])),
        ("small_gated", small),
    ]
}

fn small() {
    matches_the_cpu(&SIZES[1..3]);
    gives_its_output_again(&SIZES[1..3]);
    adds_the_l1_gradient(&[(64, 128)]);
}

const SIZES: [(usize, usize); 7] =
    [(1, 1), (3, 5), (7, 8), (5, 12), (64, 1408), (33, 273), (130, 64)];

fn matches_the_cpu(sizes: &[(usize, usize)]) {
    for (seed, &(n, ffn)) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (gu, dh) = (random.tensor((n, 2 * ffn)), random.tensor((n, ffn)));
        for f in ALL {
            let h = gated::forward(&gu, f).unwrap();
            let dgu = gated::backward(&gu, f, &dh).unwrap();
            for (dtype, tolerance) in TYPES {
                for place in [on_gpu, on_gpu_at_an_odd_place] {
                    let what = format!("{f:?} {n} x {ffn} {dtype:?}");
                    let (gu, dh) = (place(&gu, dtype), place(&dh, dtype));
                    assert_close(&what, &gated::forward(&gu, f).unwrap(), &h, tolerance);
                    assert_close(&what, &gated::backward(&gu, f, &dh).unwrap(), &dgu, tolerance);
                    let none = gu.narrow(0, 0, 0).unwrap();
                    assert_eq!(gated::forward(&none, f).unwrap().dims(), [0, ffn]);
                }
            }
        }
    }
}

fn gives_its_output_again(sizes: &[(usize, usize)]) {
    for (seed, &(n, ffn)) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (gu, dh) = (random.tensor((n, 2 * ffn)), random.tensor((n, ffn)));
        for (dtype, _) in TYPES {
            let (gu, dh) = (on_gpu(&gu, dtype), on_gpu(&dh, dtype));
            for f in ALL {
                let (dgu, h) = gated::backward_with_output(&gu, f, &dh).unwrap();
                assert_same("dgu", &dgu, &gated::backward(&gu, f, &dh).unwrap());
                assert_same("h", &h, &gated::forward(&gu, f).unwrap());
            }
        }
    }
}

fn adds_the_l1_gradient(sizes: &[(usize, usize)]) {
    for (seed, &(n, width)) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (h, dh) = (random.tensor((n, width)), random.tensor((n, width)));
        let h = relufy_ops::pointwise::forward(&h, Pointwise::FatRelu { threshold: -0.5 }).unwrap();
        for (dtype, tolerance) in TYPES {
            for place in [on_gpu, on_gpu_at_an_odd_place] {
                let expected = dh.copy().unwrap();
                let sum = gated::add_l1_gradient(&h, 0.25, &expected).unwrap();
                let (h, one, other) = (place(&h, dtype), place(&dh, dtype), place(&dh, dtype));
                let found = gated::add_l1_gradient(&h, 0.25, &one).unwrap();
                assert!((found - sum).abs() <= 1e-6 * sum, "{found}, not {sum}");
                assert_close("dh", &one, &expected, tolerance);
                let again = gated::add_l1_gradient(&h, 0.25, &other).unwrap();
                assert_eq!(found.to_bits(), again.to_bits());
                assert_same("dh", &one, &other);
            }
        }
    }
    let h = Tensor::new(&[f32::NAN, 1.0, -1.0, 0.0, -0.0], gpu()).unwrap();
    let dh = Tensor::zeros(5, DType::F32, gpu()).unwrap();
    assert!(gated::add_l1_gradient(&h, -0.5, &dh).unwrap().is_nan());
    assert_eq!(dh.to_vec1::<f32>().unwrap()[1..], [-0.5, 0.5, 0.0, 0.0]);
    assert!(gated::add_l1_gradient(&h, 0.5, &h).is_err());
}
