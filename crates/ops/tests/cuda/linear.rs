//! Products, biases and their gradients.

use candle_core::Device;
use relufy_ops::{Accum, linear};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, nan, on_gpu};

pub fn trials() -> Trials {
    vec![
        ("linear_matches_the_cpu", matches_the_cpu),
        ("linear_adds_f32_gradients_of_bf16", adds_f32_gradients_of_bf16),
        ("linear_writes_only_the_rows_asked_for", writes_only_the_rows_asked_for),
        ("linear_onto_a_residual_and_with_relu", onto_a_residual_and_with_relu),
        ("linear_without_rows", without_rows),
        ("linear_repeats", repeats),
        ("small_linear", biases),
    ]
}

/// The sums of columns, which are not cuBLAS's.
fn biases() {
    let dy = Random::new(12).tensor((70, 33));
    let db = nan(33, candle_core::DType::F32).to_device(&Device::Cpu).unwrap();
    linear::backward_bias(&dy, 0..33, (&db, Accum::Overwrite)).unwrap();
    for (dtype, tolerance) in TYPES {
        let to_db = nan(33, dtype);
        linear::backward_bias(&on_gpu(&dy, dtype), 0..33, (&to_db, Accum::Overwrite)).unwrap();
        assert_close("db", &to_db, &db, tolerance);
    }
}

const SIZES: [(usize, usize, usize); 6] =
    [(1, 8, 8), (3, 5, 7), (64, 96, 32), (130, 257, 66), (1000, 64, 200), (17, 1024, 3)];

fn matches_the_cpu() {
    for (seed, (n, inputs, outputs)) in SIZES.into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (x, w) = (random.tensor((n, inputs)), random.tensor((outputs, inputs)));
        let (b, dy) = (random.tensor(outputs), random.tensor((n, outputs)));
        let expected = [
            linear::forward(&x, &w, None).unwrap(),
            linear::forward(&x, &w, Some(&b)).unwrap(),
            linear::backward_input(&dy, &w, None).unwrap(),
        ];
        let (dw, db) = (w.zeros_like().unwrap(), b.zeros_like().unwrap());
        linear::backward_weight(&dy, &x, 0..outputs, (&dw, Accum::Overwrite)).unwrap();
        linear::backward_bias(&dy, 0..outputs, (&db, Accum::Overwrite)).unwrap();
        for (dtype, tolerance) in TYPES {
            let [x, w, b, dy] = [&x, &w, &b, &dy].map(|t| on_gpu(t, dtype));
            let found = [
                linear::forward(&x, &w, None).unwrap(),
                linear::forward(&x, &w, Some(&b)).unwrap(),
                linear::backward_input(&dy, &w, None).unwrap(),
            ];
            for (what, found, expected) in [
                ("y", &found[0], &expected[0]),
                ("y+b", &found[1], &expected[1]),
                ("dx", &found[2], &expected[2]),
            ] {
                let what = format!("{what} {dtype:?} {n} x {inputs} x {outputs}");
                assert_close(&what, found, expected, tolerance);
            }
            let (to_dw, to_db) = (nan((outputs, inputs), dtype), nan(outputs, dtype));
            linear::backward_weight(&dy, &x, 0..outputs, (&to_dw, Accum::Overwrite)).unwrap();
            linear::backward_bias(&dy, 0..outputs, (&to_db, Accum::Overwrite)).unwrap();
            assert_close("dw", &to_dw, &dw, tolerance);
            assert_close("db", &to_db, &db, tolerance);
            let into = found[2].copy().unwrap();
            linear::backward_input(&dy, &w, Some((&into, Accum::Add))).unwrap();
            assert_close("dx twice", &into, &(&expected[2] * 2.0).unwrap(), tolerance);
        }
    }
}

fn adds_f32_gradients_of_bf16() {
    let mut random = Random::new(9);
    let (n, inputs, outputs) = (300, 72, 40);
    let (x, dy) = (random.tensor((n, inputs)), random.tensor((n, outputs)));
    let dw = random.tensor((outputs, inputs));
    let db = random.tensor(outputs);
    let (to_dw, to_db) =
        (on_gpu(&dw, candle_core::DType::F32), on_gpu(&db, candle_core::DType::F32));
    linear::backward_weight(&dy, &x, 0..outputs, (&dw, Accum::Add)).unwrap();
    linear::backward_bias(&dy, 0..outputs, (&db, Accum::Add)).unwrap();
    let [x, dy] = [&x, &dy].map(|t| on_gpu(t, candle_core::DType::BF16));
    linear::backward_weight(&dy, &x, 0..outputs, (&to_dw, Accum::Add)).unwrap();
    linear::backward_bias(&dy, 0..outputs, (&to_db, Accum::Add)).unwrap();
    assert_close("dw", &to_dw, &dw, 1e-5);
    assert_close("db", &to_db, &db, 1e-5);
}

fn writes_only_the_rows_asked_for() {
    let mut random = Random::new(10);
    let (x, dy) = (random.tensor((50, 24)), random.tensor((50, 33)));
    let (dw, db) = (random.tensor((33, 24)), random.tensor(33));
    for (dtype, tolerance) in TYPES {
        let (to_dw, to_db) = (on_gpu(&dw, dtype), on_gpu(&db, dtype));
        let (dw, db) = (dw.copy().unwrap(), db.copy().unwrap());
        linear::backward_weight(&dy, &x, 8..19, (&dw, Accum::Overwrite)).unwrap();
        linear::backward_bias(&dy, 8..19, (&db, Accum::Overwrite)).unwrap();
        let [x, dy] = [&x, &dy].map(|t| on_gpu(t, dtype));
        linear::backward_weight(&dy, &x, 8..19, (&to_dw, Accum::Overwrite)).unwrap();
        linear::backward_bias(&dy, 8..19, (&to_db, Accum::Overwrite)).unwrap();
        assert_close("dw", &to_dw, &dw, tolerance);
        assert_close("db", &to_db, &db, tolerance);
    }
}

fn onto_a_residual_and_with_relu() {
    for (seed, (n, inputs, outputs)) in SIZES.into_iter().enumerate() {
        let mut random = Random::new(100 + seed as u64);
        let (x, w) = (random.tensor((n, inputs)), random.tensor((outputs, inputs)));
        let (b, residual) = (random.tensor(outputs), random.tensor((n, outputs)));
        for (dtype, tolerance) in TYPES {
            let there = [&x, &w, &b, &residual].map(|t| on_gpu(t, dtype));
            for bias in [false, true] {
                let expected = linear::forward_onto(&residual, &x, &w, bias.then_some(&b)).unwrap();
                let [x, w, b, residual] = &there;
                let found = linear::forward_onto(residual, x, w, bias.then_some(b)).unwrap();
                assert_close("onto a residual", &found, &expected, tolerance);
            }
            let expected = linear::forward_relu(&x, &w, Some(&b)).unwrap();
            let [x, w, b, _] = &there;
            let found = linear::forward_relu(x, w, Some(b)).unwrap();
            assert_close("with ReLU", &found, &expected, tolerance);
        }
    }
}

fn without_rows() {
    for (dtype, _) in TYPES {
        let none = |width| {
            on_gpu(
                &candle_core::Tensor::zeros((0, width), candle_core::DType::F32, &Device::Cpu)
                    .unwrap(),
                dtype,
            )
        };
        let w = nan((4, 8), dtype);
        assert_eq!(linear::forward(&none(8), &w, None).unwrap().dims(), [0, 4]);
        let (dw, db) = (nan((4, 8), dtype), nan(4, dtype));
        linear::backward_weight(&none(4), &none(8), 0..4, (&dw, Accum::Overwrite)).unwrap();
        linear::backward_bias(&none(4), 0..4, (&db, Accum::Overwrite)).unwrap();
        assert_same("dw", &dw, &dw.zeros_like().unwrap());
        assert_same("db", &db, &db.zeros_like().unwrap());
    }
}

fn repeats() {
    let mut random = Random::new(11);
    let (x, w, b) = (random.tensor((777, 512)), random.tensor((1030, 512)), random.tensor(1030));
    for (dtype, _) in TYPES {
        let [x, w, b] = [&x, &w, &b].map(|t| on_gpu(t, dtype));
        let once = || {
            let y = linear::forward(&x, &w, Some(&b)).unwrap();
            let (dw, db) = (nan((1030, 512), dtype), nan(1030, dtype));
            linear::backward_weight(&y, &x, 0..1030, (&dw, Accum::Overwrite)).unwrap();
            linear::backward_bias(&y, 0..1030, (&db, Accum::Overwrite)).unwrap();
            [y, dw, db]
        };
        for (one, other) in once().iter().zip(&once()) {
            assert_same("a linear layer", one, other);
        }
    }
}
