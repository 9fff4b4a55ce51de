//! The linear layer and the product behind it.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]

mod oracle;

use candle_core::{Device, Tensor};
use oracle::{Found, Random, assert_close, bits, check, poison, same_for_any_threads};
use proptest::prelude::*;
use relufy_ops::gemm::{MatMut, MatRef, Threads, gemm};
use relufy_ops::{Accum, Error, linear};

fn one_case(n: usize, inputs: usize, outputs: usize, with_bias: bool, seed: u64) {
    let mut random = Random::new(seed);
    let (x, w) = (random.tensor((n, inputs)), random.tensor((outputs, inputs)));
    let (b, dy) = (random.tensor(outputs), random.tensor((n, outputs)));
    let bias = with_bias.then_some(&b);
    let y = linear::forward(&x, &w, bias).unwrap();
    let dx = linear::backward_input(&dy, &w, None).unwrap();
    let (dw, db) = (poison((outputs, inputs)), poison(outputs));
    linear::backward_weight(&dy, &x, 0..outputs, (&dw, Accum::Overwrite)).unwrap();
    linear::backward_bias(&dy, 0..outputs, (&db, Accum::Overwrite)).unwrap();
    let gradients = vec![Some(dx), Some(dw), with_bias.then_some(db)];
    check(&[&x, &w, &b], &dy, &Found { y, gradients }, |t| {
        // candle's matmul refuses empty matrices; a sum over an outer product does not.
        let wide = t[0].unsqueeze(1)?.broadcast_mul(&t[1].unsqueeze(0)?)?;
        let y = wide.sum(2)?;
        if with_bias { y.broadcast_add(&t[2]) } else { Ok(y) }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn agrees_with_the_oracle(n in 0usize..7, i in 1usize..40, o in 1usize..40, bias: bool, seed: u64) {
        one_case(n, i, o, bias, seed);
    }
}

#[test]
fn agrees_where_threads_share_the_work() {
    one_case(130, 70, 190, true, 1);
    one_case(1, 300, 517, true, 2);
    one_case(1, 300, 517, false, 3);
}

#[test]
fn adds_and_touches_only_its_rows() {
    let mut random = Random::new(5);
    let (x, dy) = (random.tensor((6, 9)), random.tensor((6, 8)));
    let start = random.tensor((8, 9));
    let full = poison((8, 9));
    linear::backward_weight(&dy, &x, 0..8, (&full, Accum::Overwrite)).unwrap();
    let dw = start.copy().unwrap();
    linear::backward_weight(&dy, &x, 2..5, (&dw, Accum::Add)).unwrap();
    let sum = (start.narrow(0, 2, 3).unwrap() + full.narrow(0, 2, 3).unwrap()).unwrap();
    assert_close("rows 2..5", &dw.narrow(0, 2, 3).unwrap(), &sum, 1e-6);
    for (from, len) in [(0, 2), (5, 3)] {
        let part = |t: &Tensor| bits(&t.narrow(0, from, len).unwrap());
        assert_eq!(part(&dw), part(&start), "rows {from}.. were touched");
    }
    let db = start
        .narrow(0, 0, 1)
        .unwrap()
        .narrow(1, 0, 8)
        .unwrap()
        .flatten_all()
        .unwrap()
        .copy()
        .unwrap();
    let before = bits(&db);
    linear::backward_bias(&dy, 3..4, (&db, Accum::Add)).unwrap();
    let after = bits(&db);
    let changed: Vec<usize> = (0..8).filter(|&i| before[i] != after[i]).collect();
    assert_eq!(changed, [3]);
}

#[test]
fn writes_the_input_gradient_where_it_is_told() {
    let mut random = Random::new(6);
    let (dy, w, start) = (random.tensor((5, 4)), random.tensor((4, 3)), random.tensor((5, 3)));
    let fresh = linear::backward_input(&dy, &w, None).unwrap();
    let dx = start.copy().unwrap();
    let same = linear::backward_input(&dy, &w, Some((&dx, Accum::Add))).unwrap();
    assert_close("sum", &dx, &(start + &fresh).unwrap(), 1e-6);
    assert_eq!(bits(&same), bits(&dx));
    linear::backward_input(&dy, &w, Some((&dx, Accum::Overwrite))).unwrap();
    assert_eq!(bits(&dx), bits(&fresh));
}

#[test]
fn gradients_are_views_of_one_buffer() {
    let mut random = Random::new(7);
    let (x, dy) = (random.tensor((6, 4)), random.tensor((6, 8)));
    let arena = poison(3 * 32);
    let dw = arena.narrow(0, 32, 32).unwrap().reshape((8, 4)).unwrap();
    linear::backward_weight(&dy, &x, 0..8, (&dw, Accum::Overwrite)).unwrap();
    let written: Vec<bool> =
        arena.to_vec1::<f32>().unwrap().into_iter().map(|v| !v.is_nan()).collect();
    let expected: Vec<bool> = (0..96).map(|i| (32..64).contains(&i)).collect();
    assert_eq!(written, expected);
}

#[test]
fn says_what_does_not_fit() {
    let mut random = Random::new(8);
    let (x, w) = (random.tensor((2, 3)), random.tensor((4, 3)));
    let shape = |r: relufy_ops::Result<Tensor>| matches!(r, Err(Error::Shape { .. }));
    assert!(shape(linear::forward(&x, &w.t().unwrap().contiguous().unwrap(), None)));
    assert!(shape(linear::forward(&x, &w, Some(&x))));
    let strided = w.t().unwrap();
    let y = linear::forward(&random.tensor((2, 4)), &strided, None);
    assert!(matches!(y, Err(Error::NotContiguous { .. })));
    let half = x.to_dtype(candle_core::DType::F16).unwrap();
    assert!(matches!(linear::forward(&half, &w, None), Err(Error::NoKernel { .. })));
    let flat = random.tensor(3);
    assert!(matches!(linear::forward(&flat, &w, None), Err(Error::Rank { .. })));
    let dw = linear::backward_weight(&random.tensor((2, 4)), &x, 2..9, (&w, Accum::Add));
    assert!(matches!(dw, Err(Error::Range { .. })));
    let dy = random.tensor((4, 3));
    let aliased =
        linear::backward_weight(&dy, &dy, 0..3, (&dy.narrow(0, 0, 3).unwrap(), Accum::Add));
    assert!(matches!(aliased, Err(Error::Aliased { .. })));
}

#[test]
fn products_stay_inside_their_slices() {
    let a = [1.0f32; 6];
    assert!(MatRef::new(&a, 2, 4).is_err());
    assert!(MatRef::with_stride(&a, 2, 3, 2).is_err());
    assert!(MatRef::with_stride(&a, 2, 2, 4).is_ok());
    assert!(MatRef::with_stride(&a, usize::MAX, 2, 4).is_err());
    let mut c = [f32::NAN; 4];
    let product = MatMut::new(&mut c, 2, 2, Accum::Overwrite).unwrap();
    let (x, y) = (MatRef::new(&a, 2, 3).unwrap(), MatRef::new(&a, 2, 3).unwrap());
    assert!(gemm(1.0, x, y, product, Threads::One).is_err());
    let product = MatMut::new(&mut c, 2, 2, Accum::Overwrite).unwrap();
    gemm(2.0, x, y.t(), product, Threads::One).unwrap();
    assert_eq!(c, [6.0; 4]);
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut random = Random::new(9);
    let (x, w, b) = (random.tensor((300, 333)), random.tensor((517, 333)), random.tensor(517));
    let (dy, row) = (random.tensor((300, 517)), random.tensor((1, 333)));
    same_for_any_threads(|| {
        let (dw, db) = (poison((517, 333)), poison(517));
        linear::backward_weight(&dy, &x, 0..517, (&dw, Accum::Overwrite)).unwrap();
        linear::backward_weight(&dy, &x, 100..400, (&dw, Accum::Add)).unwrap();
        linear::backward_bias(&dy, 0..517, (&db, Accum::Overwrite)).unwrap();
        vec![
            linear::forward(&x, &w, Some(&b)).unwrap(),
            linear::forward(&x, &w, None).unwrap(),
            linear::forward(&row, &w, None).unwrap(),
            linear::backward_input(&dy, &w, None).unwrap(),
            dw,
            db,
        ]
    });
}

#[test]
fn empty_inputs_give_zero_gradients() {
    let x = Tensor::zeros((0, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    let dy = Tensor::zeros((0, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    let dw = poison((4, 3));
    linear::backward_weight(&dy, &x, 1..3, (&dw, Accum::Overwrite)).unwrap();
    let rows = dw.narrow(0, 1, 2).unwrap();
    assert_eq!(bits(&rows), [0; 6]);
}
