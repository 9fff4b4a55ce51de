//! Rotary positions and embeddings.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]

mod oracle;

use candle_core::{DType, Device, Tensor};
use oracle::{Found, Random, assert_close, bits, check, poison, same_for_any_threads};
use proptest::prelude::*;
use relufy_ops::rope::{self, RopePairs, RopeTable};
use relufy_ops::{Accum, Error, embedding};

fn frequencies(rot: usize) -> Vec<f64> {
    (0..rot / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / rot as f64)).collect()
}

/// The rotation as one matrix for each position, `[width, width]`, in f64.
fn rotation(
    width: usize,
    heads: std::ops::Range<usize>,
    dim: usize,
    rot: usize,
    pairs: RopePairs,
    position: u32,
) -> Tensor {
    let mut m = vec![0f64; width * width];
    for i in 0..width {
        m[i * width + i] = 1.0;
    }
    for head in heads.step_by(dim) {
        for (i, f) in frequencies(rot).into_iter().enumerate() {
            let (a, b) = match pairs {
                RopePairs::Half => (head + i, head + i + rot / 2),
                RopePairs::Interleaved => (head + 2 * i, head + 2 * i + 1),
            };
            let angle = f64::from(position as f32 * f as f32);
            m[a * width + a] = angle.cos();
            m[b * width + b] = angle.cos();
            m[a * width + b] = angle.sin();
            m[b * width + a] = -angle.sin();
        }
    }
    Tensor::from_vec(m, (width, width), &Device::Cpu).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn rotations_agree_with_the_oracle(
        n in 0usize..5, half in 1usize..9, still in 0usize..4, heads in 1usize..4, seed: u64
    ) {
        for pairs in [RopePairs::Half, RopePairs::Interleaved] {
            let mut random = Random::new(seed);
            let (rot, dim) = (2 * half, 2 * half + still);
            let cols = 2..2 + heads * dim;
            let width = cols.end + 3;
            let positions = random.ids(n, 900);
            let table = RopeTable::new(&frequencies(rot), 900, 1.0);
            let (x, dy) = (random.tensor((n, width)), random.tensor((n, width)));
            let (y, dx) = (x.copy().unwrap(), dy.copy().unwrap());
            rope::apply(&y, cols.clone(), dim, &table, pairs, &positions, false).unwrap();
            rope::apply(&dx, cols.clone(), dim, &table, pairs, &positions, true).unwrap();
            let back = y.copy().unwrap();
            rope::apply(&back, cols.clone(), dim, &table, pairs, &positions, true).unwrap();
            assert_close("there and back", &back, &x, 1e-6);
            if n == 0 {
                return Ok(());
            }
            let turns: Vec<Tensor> =
                positions.iter().map(|&p| rotation(width, cols.clone(), dim, rot, pairs, p)).collect();
            let turns = Tensor::stack(&turns, 0).unwrap();
            check(&[&x], &dy, &Found { y, gradients: vec![Some(dx)] }, |t| {
                t[0].unsqueeze(1)?.matmul(&turns)?.squeeze(1)
            });
        }
    }

    #[test]
    fn embeddings_agree_with_the_oracle(n in 0usize..9, rows in 1u32..6, width in 1usize..40, seed: u64) {
        for multiplier in [None, Some(2.5f32)] {
            let mut random = Random::new(seed);
            let (table, ids) = (random.tensor((rows as usize, width)), random.ids(n, rows));
            let dx = random.tensor((n, width));
            let y = embedding::forward(&table, &ids, multiplier).unwrap();
            let dtable = poison((rows as usize, width));
            embedding::backward(&ids, &dx, multiplier, (&dtable, Accum::Overwrite)).unwrap();
            let twice = dtable.copy().unwrap();
            embedding::backward(&ids, &dx, multiplier, (&twice, Accum::Add)).unwrap();
            assert_close("added", &twice, &(&dtable * 2.0).unwrap(), 1e-6);
            let one_hot: Vec<f64> =
                ids.iter().flat_map(|&id| (0..rows).map(move |r| f64::from(u8::from(r == id)))).collect();
            let one_hot = Tensor::from_vec(one_hot, (n, rows as usize, 1), &Device::Cpu).unwrap();
            check(&[&table], &dx, &Found { y, gradients: vec![Some(dtable)] }, |t| {
                one_hot.broadcast_mul(&t[0].unsqueeze(0)?)?.sum(1)? * f64::from(multiplier.unwrap_or(1.0))
            });
        }
    }
}

#[test]
fn angles_are_rounded_as_hugging_face_rounds_them() {
    // At this position the angle 123457 * 0.7498942 differs from its f32 by more than 1e-3.
    let table = RopeTable::new(&[0.749_894_2], 123_458, 1.5);
    let x = Tensor::new(&[[1f32, 0.0]], &Device::Cpu).unwrap();
    rope::apply(&x, 0..2, 2, &table, RopePairs::Half, &[123_457], false).unwrap();
    let angle = f64::from(123_457f32 * 0.749_894_2f64 as f32);
    let expected = Tensor::new(&[[1.5 * angle.cos(), 1.5 * angle.sin()]], &Device::Cpu).unwrap();
    assert_close("turned", &x, &expected, 1e-7);
}

#[test]
fn learned_positions_are_added() {
    let mut random = Random::new(1);
    let (x, table) = (random.tensor((3, 5)), random.tensor((4, 5)));
    let y = x.copy().unwrap();
    embedding::add_rows(&y, &table, &[3, 0, 3]).unwrap();
    let rows = embedding::forward(&table, &[3, 0, 3], None).unwrap();
    assert_eq!(bits(&y), bits(&(x + rows).unwrap()));
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut random = Random::new(2);
    let (table, ids) = (random.tensor((777, 100)), random.ids(900, 777));
    let (x, positions) = (random.tensor((900, 100)), random.ids(900, 64));
    let rope_table = RopeTable::new(&frequencies(20), 64, 1.0);
    same_for_any_threads(|| {
        let (dtable, y) = (poison((777, 100)), x.copy().unwrap());
        embedding::backward(&ids, &x, None, (&dtable, Accum::Overwrite)).unwrap();
        rope::apply(&y, 0..100, 20, &rope_table, RopePairs::Half, &positions, false).unwrap();
        vec![embedding::forward(&table, &ids, Some(3.0)).unwrap(), dtable, y]
    });
}

#[test]
fn says_what_is_out_of_range() {
    let mut random = Random::new(3);
    let table = random.tensor((4, 6));
    let ids = embedding::forward(&table, &[0, 4], None);
    assert!(matches!(ids, Err(Error::TokenOutOfRange { index: 1, id: 4, rows: 4, .. })));
    let turns = RopeTable::new(&frequencies(4), 8, 1.0);
    let x = random.tensor((1, 6));
    let turn = |cols, dim, position: &[u32]| {
        rope::apply(&x, cols, dim, &turns, RopePairs::Half, position, false)
    };
    assert!(matches!(turn(0..6, 6, &[8]), Err(Error::PositionOutOfRange { position: 8, .. })));
    assert!(matches!(turn(0..6, 6, &[1, 2]), Err(Error::Shape { .. })));
    assert!(matches!(turn(0..8, 4, &[1]), Err(Error::Range { .. })));
    assert!(matches!(turn(0..6, 4, &[1]), Err(Error::Indivisible { .. })));
    assert!(matches!(turn(0..6, 0, &[1]), Err(Error::Indivisible { .. })));
    assert!(matches!(turn(0..6, 2, &[1]), Err(Error::Unsupported { .. })));
    let wrong_type = x.to_dtype(DType::F64).unwrap();
    let e = embedding::add_rows(&wrong_type, &table, &[0]);
    assert!(matches!(e, Err(Error::NoKernel { .. })));
}
