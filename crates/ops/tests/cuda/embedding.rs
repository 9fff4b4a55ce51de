//! Embeddings and the gradient of their table.

use candle_core::{DType, Tensor};
use relufy_ops::{Accum, Error, embedding};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, gpu, nan, on_gpu};

pub fn trials() -> Trials {
    vec![
        ("embedding_matches_the_cpu", || matches_the_cpu(&SIZES)),
        ("embedding_gradient_matches_the_cpu", || gradient_matches_the_cpu(&SIZES)),
        ("embedding_of_views", of_views),
        ("embedding_repeats", repeats),
        ("embedding_checks_ids", checks_ids),
        ("small_embedding", small),
    ]
}

/// So many places of one id that they are added in pieces.
fn small() {
    let sizes = [(140, 7), (140, 16)];
    matches_the_cpu(&sizes);
    gradient_matches_the_cpu(&sizes);
}

const ROWS: u32 = 501;

/// Ids of which more than half are the same.
fn ids(random: &mut Random, n: usize) -> Vec<u32> {
    let mut ids = random.ids(n, ROWS);
    ids.iter_mut().filter(|id| **id > ROWS / 3).for_each(|id| *id = 7);
    ids
}

const SIZES: [(usize, usize); 8] =
    [(0, 64), (1, 8), (5, 1), (33, 7), (130, 12), (700, 64), (3000, 768), (1500, 2056)];

fn matches_the_cpu(sizes: &[(usize, usize)]) {
    for &(n, width) in sizes {
        let mut random = Random::new(n as u64);
        let (table, x) = (random.tensor((ROWS as usize, width)), random.tensor((n, width)));
        let ids = ids(&mut random, n);
        let sum = x.copy().unwrap();
        embedding::add_rows(&sum, &table, &ids).unwrap();
        for (dtype, tolerance) in TYPES {
            let on_device = on_gpu(&table, dtype);
            for m in [None, Some(27.5)] {
                let found = embedding::forward(&on_device, &ids, m).unwrap();
                let expected = embedding::forward(&table, &ids, m).unwrap();
                assert_close(&format!("{n} x {width} {dtype:?}"), &found, &expected, tolerance);
            }
            let found = on_gpu(&x, dtype);
            embedding::add_rows(&found, &on_device, &ids).unwrap();
            assert_close(&format!("added {n} x {width} {dtype:?}"), &found, &sum, tolerance);
        }
    }
}

fn gradient_matches_the_cpu(sizes: &[(usize, usize)]) {
    for &(n, width) in sizes {
        let mut random = Random::new(n as u64);
        let shape = (ROWS as usize, width);
        let (dx, there) = (random.tensor((n, width)), random.tensor(shape));
        let ids = ids(&mut random, n);
        for (m, accum) in [(None, Accum::Overwrite), (Some(1.5), Accum::Add)] {
            let expected = there.copy().unwrap();
            embedding::backward(&ids, &dx, m, (&expected, accum)).unwrap();
            for (dtype, tolerance) in TYPES {
                for (gradient, least) in TYPES {
                    let found = match accum {
                        Accum::Overwrite => nan(shape, gradient),
                        Accum::Add => on_gpu(&there, gradient),
                    };
                    let dx = on_gpu(&dx, dtype);
                    embedding::backward(&ids, &dx, m, (&found, accum)).unwrap();
                    let what = format!("{n} x {width} {accum:?} {dtype:?} {gradient:?}");
                    assert_close(&what, &found, &expected, tolerance.max(least));
                }
            }
        }
    }
}

fn of_views() {
    for width in [5, 64] {
        let mut random = Random::new(2);
        let table = random.tensor((ROWS as usize + 1, width));
        let (dx, ids) = (random.tensor((41, width)), ids(&mut random, 40));
        let run = |table: &Tensor, dx: &Tensor| {
            let (table, dx) =
                (table.narrow(0, 1, ROWS as usize).unwrap(), dx.narrow(0, 1, 40).unwrap());
            let x = embedding::forward(&table, &ids, None).unwrap();
            embedding::backward(&ids, &dx, None, (&table, Accum::Overwrite)).unwrap();
            x
        };
        for (dtype, tolerance) in TYPES {
            let (expected, found) = (table.copy().unwrap(), on_gpu(&table, dtype));
            let x = run(&expected, &dx);
            assert_close("rows", &run(&found, &on_gpu(&dx, dtype)), &x, tolerance);
            assert_close("the table around the view", &found, &expected, tolerance);
        }
    }
}

fn repeats() {
    let mut random = Random::new(3);
    let (n, width) = (9000, 256);
    let (dx, ids) = (on_gpu(&random.tensor((n, width)), DType::BF16), ids(&mut random, n));
    let run = || {
        let dtable = nan((ROWS as usize, width), DType::F32);
        embedding::backward(&ids, &dx, None, (&dtable, Accum::Overwrite)).unwrap();
        dtable
    };
    assert_same("dtable", &run(), &run());
}

fn checks_ids() {
    let table = Tensor::zeros((4, 8), DType::BF16, gpu()).unwrap();
    let found = embedding::forward(&table, &[0, 4], None);
    assert!(matches!(found, Err(Error::TokenOutOfRange { index: 1, .. })));
}
