//! Moving rows.

use relufy_ops::rows;

use crate::common::{Random, TYPES, Trials, assert_same, gpu, nan, on_gpu, on_gpu_at_an_odd_place};

pub fn trials() -> Trials {
    vec![
        ("rows_gather", || gather(&WIDTHS)),
        ("rows_scatter", || scatter(&WIDTHS)),
        ("rows_relocate", relocate),
        ("small_rows", small),
    ]
}

const WIDTHS: [usize; 5] = [1, 3, 24, 64, 1031];

fn small() {
    gather(&WIDTHS[1..3]);
    scatter(&WIDTHS[1..3]);
}

fn gather(widths: &[usize]) {
    for (seed, &width) in widths.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let x = random.tensor((50, width));
        let picked: Vec<usize> = random.ids(70, 50).into_iter().map(|id| id as usize).collect();
        for (dtype, _) in TYPES {
            let expected = rows::gather(&x, &picked).unwrap().to_dtype(dtype).unwrap();
            for place in [on_gpu, on_gpu_at_an_odd_place] {
                let x = place(&x, dtype);
                assert_same("gathered", &rows::gather(&x, &picked).unwrap(), &expected);
                assert_eq!(rows::gather(&x, &[]).unwrap().dims(), [0, width]);
                assert!(rows::gather(&x, &[50]).is_err());
            }
        }
    }
}

fn scatter(widths: &[usize]) {
    for (seed, &width) in widths.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (x, target) = (random.tensor((30, 2 * width + 3)), random.tensor((100, width)));
        let sorted: Vec<usize> = (0..30).map(|i| 3 * i + 2).collect();
        // Some rows twice: the last wins.
        let mixed: Vec<usize> = random.ids(30, 40).into_iter().map(|id| id as usize).collect();
        for list in [sorted, mixed] {
            for start in [0, 1, 3, width] {
                let cols = start..start + width;
                let expected = target.copy().unwrap();
                rows::scatter(&x, cols.clone(), &expected, &list).unwrap();
                for (dtype, _) in TYPES {
                    for place in [on_gpu, on_gpu_at_an_odd_place] {
                        let (x, target) = (place(&x, dtype), place(&target, dtype));
                        rows::scatter(&x, cols.clone(), &target, &list).unwrap();
                        assert_same("scattered", &target, &expected.to_dtype(dtype).unwrap());
                    }
                }
            }
        }
    }
    let mut types = TYPES.map(|(dtype, _)| nan((4, 4), dtype)).into_iter();
    let (wide, narrow) = (types.next().unwrap(), types.next().unwrap());
    assert!(rows::scatter(&wide, 0..4, &narrow, &[0, 1, 2, 3]).is_err());
    assert!(rows::scatter(&wide, 0..4, &wide, &[0, 1, 2, 3]).is_err());
    assert!(wide.device().same_device(gpu()));
}

fn relocate() {
    let moves = [(5, 0, 10), (0, 3, 12), (20, 20, 4), (30, 40, 10), (35, 37, 0), (48, 47, 2)];
    for (seed, width) in WIDTHS.into_iter().enumerate() {
        let x = Random::new(seed as u64).tensor((50, width));
        let expected = x.copy().unwrap();
        rows::relocate(&expected, &moves).unwrap();
        for (dtype, _) in TYPES {
            for place in [on_gpu, on_gpu_at_an_odd_place] {
                let x = place(&x, dtype);
                rows::relocate(&x, &moves).unwrap();
                assert_same("moved", &x, &expected.to_dtype(dtype).unwrap());
                assert!(rows::relocate(&x, &[(45, 0, 6)]).is_err());
            }
        }
    }
}
