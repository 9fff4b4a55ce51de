//! Sums, counts, conversions and the small in-place steps.

use candle_core::{DType, Device, Tensor};
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::{buffer, reduce};

use crate::common::{
    Random, TYPES, Trials, assert_same, gpu, nan, on_gpu, on_gpu_at_an_odd_place, values,
};

pub fn trials() -> Trials {
    vec![
        ("reduce_sums_and_counts", || sums_and_counts(&SIZES)),
        ("reduce_sums_over_many_tensors", || sums_over_many_tensors(&SIZES)),
        ("reduce_counts_of_many_tensors", counts_of_many),
        ("reduce_sees_bad_numbers", sees_bad_numbers),
        ("reduce_counts_rows_and_columns", || counts_rows_and_columns(&MATRICES)),
        ("reduce_histogram", || histogram(100_003)),
        ("reduce_in_place", || in_place(&SIZES)),
        ("reduce_casts", || casts(1 << 16)),
        ("small_reduce", small),
    ]
}

fn small() {
    sums_and_counts(&SIZES[1..3]);
    sums_over_many_tensors(&SIZES[..4]);
    counts_rows_and_columns(&[(3, 5), (200, 64), (7, 1031)]);
    histogram(20_003);
    in_place(&SIZES[1..2]);
    casts(1 << 9);
}

const SIZES: [usize; 6] = [1, 17, 16383, 16384, 3 * 16384 + 5, 1_000_003];
const MATRICES: [(usize, usize); 7] =
    [(1, 1), (3, 5), (200, 64), (1000, 1031), (129, 5632), (2, 100_000), (20_000, 40)];

/// About two thirds zeros.
fn sparse(random: &mut Random, n: usize) -> Tensor {
    pointwise::forward(&random.tensor(n), Pointwise::FatRelu { threshold: 0.6 }).unwrap()
}

#[track_caller]
fn assert_near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{found}, not {expected}");
}

fn sums_and_counts(sizes: &[usize]) {
    for (seed, &n) in sizes.iter().enumerate() {
        let x = sparse(&mut Random::new(seed as u64), n);
        for (dtype, _) in TYPES {
            for place in [on_gpu, on_gpu_at_an_odd_place] {
                let t = place(&x, dtype);
                let squares = reduce::sum_of_squares(&t).unwrap();
                assert_near(squares, reduce::sum_of_squares(&x).unwrap());
                assert_eq!(squares.to_bits(), reduce::sum_of_squares(&t).unwrap().to_bits());
                let count = reduce::count_nonzero(&t).unwrap();
                assert_eq!(count, reduce::count_nonzero(&x).unwrap());
                assert_eq!(reduce::max_abs(&t).unwrap(), reduce::max_abs(&x).unwrap());
                assert!(reduce::all_finite(&t).unwrap());
                let none = t.narrow(0, 0, 0).unwrap();
                assert_eq!(reduce::sum_of_squares(&none).unwrap(), 0.0);
                assert_eq!(reduce::count_nonzero(&none).unwrap(), 0);
                assert_eq!(reduce::max_abs(&none).unwrap(), 0.0);
            }
        }
    }
    let large = Tensor::full(1e30f32, 100_000, gpu()).unwrap();
    assert!((reduce::sum_of_squares(&large).unwrap() / 1e65 - 1.0).abs() < 1e-6);
}

fn sums_over_many_tensors(sizes: &[usize]) {
    assert_eq!(reduce::sum_of_squares_of(&[]).unwrap(), 0.0);
    let mut random = Random::new(3);
    let host: Vec<Tensor> = sizes.iter().map(|n| sparse(&mut random, *n)).collect();
    let mut there = Vec::new();
    for (i, t) in host.iter().enumerate() {
        let dtype = TYPES[i % 2].0;
        there.push(if i % 3 == 0 { on_gpu_at_an_odd_place(t, dtype) } else { on_gpu(t, dtype) });
    }
    there.push(there[0].narrow(0, 0, 0).unwrap());
    let list: Vec<&Tensor> = there.iter().collect();
    let found = reduce::sum_of_squares_of(&list).unwrap();
    assert_near(found, reduce::sum_of_squares_of(&host.iter().collect::<Vec<_>>()).unwrap());
    assert_eq!(found.to_bits(), reduce::sum_of_squares_of(&list).unwrap().to_bits());
}

fn counts_of_many() {
    assert!(reduce::NonzeroCounts::default().read().unwrap().is_empty());
    let mut random = Random::new(8);
    let (mut there, mut known) = (reduce::NonzeroCounts::default(), Vec::new());
    // More than have room in one piece.
    for n in 0..600 {
        let x = sparse(&mut random, 1 + n * 13 % 301);
        there.count(&on_gpu(&x, TYPES[n % 2].0)).unwrap();
        known.push(reduce::count_nonzero(&x).unwrap());
    }
    assert_eq!(there.read().unwrap(), known);
}

fn sees_bad_numbers() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 16384, 2 * 16384 + 2] {
            let mut x = vec![1f32; 2 * 16384 + 3];
            x[place] = bad;
            let t = Tensor::new(x, gpu()).unwrap();
            for t in [t.to_dtype(DType::BF16).unwrap(), t] {
                assert!(!reduce::all_finite(&t).unwrap());
                let found = reduce::max_abs(&t).unwrap();
                assert!(if bad.is_nan() { found.is_nan() } else { found == f32::INFINITY });
                assert!(!reduce::sum_of_squares(&t).unwrap().is_finite());
                assert_eq!(reduce::count_nonzero(&t).unwrap(), 2 * 16384 + 3);
            }
        }
    }
}

fn counts_rows_and_columns(sizes: &[(usize, usize)]) {
    for (seed, &(rows, width)) in sizes.iter().enumerate() {
        let x = sparse(&mut Random::new(seed as u64), rows * width).reshape((rows, width)).unwrap();
        for (dtype, _) in TYPES {
            for place in [on_gpu, on_gpu_at_an_odd_place] {
                let t = place(&x, dtype);
                let found = reduce::count_nonzero_rows(&t).unwrap();
                assert!(found == reduce::count_nonzero_rows(&x).unwrap(), "rows {rows} x {width}");
                let found = reduce::count_nonzero_columns(&t).unwrap();
                let expected = reduce::count_nonzero_columns(&x).unwrap();
                assert!(found == expected, "columns {rows} x {width}");
                let none = t.narrow(0, 0, 0).unwrap();
                assert!(reduce::count_nonzero_rows(&none).unwrap().is_empty());
                assert_eq!(reduce::count_nonzero_columns(&none).unwrap(), vec![0; width]);
            }
        }
    }
}

fn histogram(n: usize) {
    let mut x = Random::new(5).tensor(n).to_vec1::<f32>().unwrap();
    x[..6].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1.0, -0.0]);
    x[n / 2..9 * n / 10].fill(0.0);
    let x = Tensor::new(x, &Device::Cpu).unwrap();
    let fine: Vec<f32> = (0..500).map(|i| (i - 250) as f32 / 64.0).collect();
    // More than fit into shared memory.
    let finest: Vec<f32> = (0..9000).map(|i| (i - 4500) as f32 / 2048.0).collect();
    for edges in [&[][..], &[0.0], &[-1.0, 0.0, 1.0], &fine, &finest] {
        let expected = reduce::histogram(&x, edges).unwrap();
        for (dtype, _) in TYPES {
            let found = reduce::histogram(&on_gpu(&x, dtype), edges).unwrap();
            assert!(found == expected, "{} edges", edges.len());
        }
    }
}

fn in_place(sizes: &[usize]) {
    for (seed, &n) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (x, other) = (random.tensor(n), random.tensor(n));
        let host = x.copy().unwrap();
        reduce::scale_in_place(&host, -2.0).unwrap();
        reduce::add_in_place(&host, &other).unwrap();
        for (dtype, _) in TYPES {
            let expected = host.to_dtype(dtype).unwrap();
            for (source, _) in TYPES {
                for place in [on_gpu, on_gpu_at_an_odd_place] {
                    let t = place(&x, dtype);
                    reduce::scale_in_place(&t, -2.0).unwrap();
                    reduce::add_in_place(&t, &place(&other, source)).unwrap();
                    assert_same("scaled and added", &t, &expected);
                    reduce::fill(&t, 0.1).unwrap();
                    let filled = Tensor::full(0.1f32, n, &Device::Cpu).unwrap();
                    assert_same("filled", &t, &filled.to_dtype(dtype).unwrap());
                }
            }
        }
    }
    let t = nan(5, DType::F32);
    assert!(reduce::add_in_place(&t, &t).is_err());
}

/// Of `halves` upper halves of an f32, evenly spread, with lower halves around the tie.
fn casts(halves: u32) {
    let all: Vec<f32> = (0..halves)
        .map(|at| at * ((1 << 16) / halves))
        .flat_map(|high| {
            [0, 1, 0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits((high << 16) | low))
        })
        .filter(|x| !x.is_nan())
        .collect();
    let x = Tensor::new(all, &Device::Cpu).unwrap();
    let half = x.to_dtype(DType::BF16).unwrap();
    let back = half.to_dtype(DType::F32).unwrap();
    for place in [on_gpu, on_gpu_at_an_odd_place] {
        let (wide, narrow) = (place(&x, DType::F32), place(&half, DType::BF16));
        assert_same("to bf16", &buffer::cast(&wide, DType::BF16).unwrap(), &half);
        assert_same("to f32", &buffer::cast(&narrow, DType::F32).unwrap(), &back);
        assert_same("same", &buffer::cast(&narrow, DType::BF16).unwrap(), &half);
        for (source, dtype, expected) in [
            (&wide, DType::F32, &x),
            (&wide, DType::BF16, &half),
            (&narrow, DType::F32, &back),
            (&narrow, DType::BF16, &half),
        ] {
            let target = nan(x.elem_count() + 2, dtype);
            buffer::copy_into(source, &target.narrow(0, 1, x.elem_count()).unwrap()).unwrap();
            let found = target.narrow(0, 1, x.elem_count()).unwrap();
            assert_same("copied", &found, expected);
            let ends = values(&target);
            assert!(ends[0].is_nan() && ends[ends.len() - 1].is_nan());
        }
    }
    let bad = Tensor::new(&[f32::NAN, f32::INFINITY, f32::MAX], gpu()).unwrap();
    let found = values(&buffer::cast(&bad, DType::BF16).unwrap());
    assert!(found[0].is_nan() && found[1..] == [f64::INFINITY; 2]);
    let elsewhere = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    assert!(buffer::copy_into(&bad, &elsewhere).is_err());
    assert!(buffer::copy_into(&elsewhere, &bad).is_err());
}
