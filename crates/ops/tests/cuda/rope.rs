//! Rotary positions.

use candle_core::{DType, Tensor};
use relufy_ops::rope::{self, RopePairs, RopeTable};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, on_gpu};

pub fn trials() -> Trials {
    vec![
        ("rope_matches_the_cpu", || matches_the_cpu(&CASES)),
        ("rope_of_views", of_views),
        ("rope_turns_back", turns_back),
        ("small_rope", || matches_the_cpu(&CASES[4..7])),
    ]
}

const MAX_POS: usize = 700;

fn table(rot: usize) -> RopeTable {
    let frequencies: Vec<f64> =
        (0..rot / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / rot as f64)).collect();
    RopeTable::new(&frequencies, MAX_POS, 1.0)
}

/// Rows, first column, heads, head_dim, rotary_dim, columns after the heads.
type Case = (usize, usize, usize, usize, usize, usize);

const CASES: [Case; 11] = [
    (33, 0, 32, 128, 128, 1024),
    (1000, 64, 3, 64, 64, 8),
    (17, 0, 5, 80, 32, 0),
    (17, 0, 5, 256, 64, 16),
    (9, 8, 2, 40, 24, 0),
    (9, 3, 3, 20, 12, 5),
    (5, 1, 2, 7, 6, 0),
    (5, 0, 9, 12, 12, 4),
    (4, 0, 2, 8, 0, 0),
    (0, 0, 2, 64, 64, 0),
    (6, 8, 0, 64, 64, 8),
];

fn matches_the_cpu(cases: &[Case]) {
    for &(n, from, heads, dim, rot, rest) in cases {
        let (cols, table) = (from..from + heads * dim, table(rot));
        let mut random = Random::new(n as u64);
        let x = random.tensor((n, cols.end + rest));
        let positions = random.ids(n, MAX_POS as u32);
        for pairs in [RopePairs::Half, RopePairs::Interleaved] {
            for inverse in [false, true] {
                let y = x.copy().unwrap();
                let turn = |x: &Tensor, table: &RopeTable| {
                    rope::apply(x, cols.clone(), dim, table, pairs, &positions, inverse).unwrap();
                };
                turn(&y, &table);
                for (dtype, tolerance) in TYPES {
                    let what = format!("{n} x {cols:?} {dim} {rot} {pairs:?} {inverse} {dtype:?}");
                    let (found, again) = (on_gpu(&x, dtype), on_gpu(&x, dtype));
                    turn(&found, &table);
                    assert_close(&what, &found, &y, tolerance);
                    turn(&again, &table.clone());
                    assert_same(&what, &found, &again);
                }
            }
        }
    }
}

fn of_views() {
    for width in [128, 67] {
        let mut random = Random::new(3);
        let x = random.tensor((12, width));
        let (positions, table) = (random.ids(11, MAX_POS as u32), table(16));
        let turn = |all: &Tensor| {
            let some = all.narrow(0, 1, 11).unwrap();
            rope::apply(&some, 0..64, 32, &table, RopePairs::Half, &positions, false).unwrap();
        };
        for (dtype, tolerance) in TYPES {
            let (expected, found) = (x.copy().unwrap(), on_gpu(&x, dtype));
            turn(&expected);
            turn(&found);
            assert_close(&format!("{width} {dtype:?}"), &found, &expected, tolerance);
        }
    }
}

fn turns_back() {
    let mut random = Random::new(4);
    let (x, table) = (random.tensor((50, 512)), table(128));
    let positions = random.ids(50, MAX_POS as u32);
    let y = on_gpu(&x, DType::F32);
    for inverse in [false, true] {
        rope::apply(&y, 0..512, 128, &table, RopePairs::Half, &positions, inverse).unwrap();
    }
    assert_close("there and back", &y, &x, 1e-6);
}
