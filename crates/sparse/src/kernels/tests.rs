//! Every instruction set and format against plain sums over the decoded rows.

use super::*;
use crate::matrix::Matrix;

fn value(part: usize, row: usize, col: usize) -> f32 {
    ((row * 31 + col * 17 + part * 7 + row * col) % 101) as f32 / 50.0 - 1.0
}

fn matrix(format: Format, rows: usize, cols: usize, parts: usize) -> Matrix {
    Matrix::pack(String::new(), format, (rows, cols, parts), |part, rows, out| {
        for (i, row) in rows.enumerate() {
            (0..cols).for_each(|col| out[i * cols + col] = value(part, row, col));
        }
    })
    .unwrap()
}

fn input(n: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..n).map(|i| ((i * 29) % 23) as f32 / 11.0 - 1.0).collect();
    x.resize(padded(n), 0.0);
    x
}

fn rows_of(matrix: &Matrix, part: usize) -> Vec<Vec<f32>> {
    let rows = matrix.part(part);
    (0..rows.rows)
        .map(|row| {
            let mut out = vec![0.0; rows.cols];
            rows.decode(row, &mut out);
            out
        })
        .collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// To f32's rounding, or to that of a factor in 16 bits.
fn close(isa: Isa, found: f32, expected: f64) {
    let bound = if format!("{isa:?}").ends_with("Vnni") { 1e-3 } else { 2e-4 };
    assert!((f64::from(found) - expected).abs() < bound, "{isa:?}: {found} for {expected}");
}

/// Lists of every length up to some, with gaps.
fn lists(rows: usize) -> impl Iterator<Item = Vec<u32>> {
    (0..21).map(move |n| (0..n).map(|k| ((k * 3 + 1) % rows) as u32).collect())
}

#[test]
fn dots_are_those_of_the_decoded_rows() {
    for isa in Isa::available() {
        for format in Format::ALL {
            for cols in [1, 64, 130] {
                let matrix = matrix(format, 67, cols, 1);
                let (decoded, x) = (rows_of(&matrix, 0), input(cols));
                for list in lists(67) {
                    let mut out = vec![f32::NAN; list.len()];
                    dot_rows(isa, &matrix.all(), &list, &x, &mut out);
                    for (k, &row) in list.iter().enumerate() {
                        close(isa, out[k], dot(&decoded[row as usize], &x));
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_rows_are_those_of_the_decoded_rows() {
    for isa in Isa::available() {
        for format in Format::ALL {
            for (cols, share) in [(1, 0..1), (200, 64..200), (200, 0..128), (320, 128..256)] {
                let matrix = matrix(format, 40, cols, 1);
                let decoded = rows_of(&matrix, 0);
                for list in lists(40) {
                    let c = input(list.len().max(1));
                    let mut y = vec![0.5; padded(share.len())];
                    let rows = matrix.all();
                    let mut scaled = Vec::new();
                    let folded = fold_scales(&rows, &list, &c[..list.len()], &mut scaled);
                    add_rows(isa, &rows, &list, folded, share.clone(), &mut y);
                    for (i, col) in share.clone().enumerate() {
                        let column: Vec<f32> =
                            list.iter().map(|&row| decoded[row as usize][col]).collect();
                        close(isa, y[i], 0.5 + dot(&column, &c));
                    }
                }
            }
        }
    }
}

#[test]
fn bundles_are_a_dot_and_a_sum() {
    for isa in Isa::available() {
        for format in Format::ALL {
            for cols in [3, 64, 192] {
                let matrix = matrix(format, 30, cols, 2);
                let (ups, downs, x) = (rows_of(&matrix, 0), rows_of(&matrix, 1), input(cols));
                let bias = input(30);
                for (list, bias) in
                    lists(30).flat_map(|list| [(list.clone(), &[][..]), (list, &bias[..])])
                {
                    let gate = input(list.len().max(1));
                    let mut products = vec![f32::NAN; list.len()];
                    let mut y = vec![0.0; padded(cols)];
                    let (up, down) = (matrix.part(0), matrix.part(1));
                    bundles(isa, (&up, &down), &list, &gate, bias, &x, &mut products, &mut y);
                    let mut expected = vec![0.0f64; cols];
                    for (k, &row) in list.iter().enumerate() {
                        let row = row as usize;
                        let bias = f64::from(bias.get(row).copied().unwrap_or(0.0));
                        let product = f64::from(gate[k]) * (dot(&ups[row], &x) + bias);
                        close(isa, products[k] / 10.0, product / 10.0);
                        for (e, d) in expected.iter_mut().zip(&downs[row]) {
                            *e += product * f64::from(*d);
                        }
                    }
                    y.iter().zip(expected).for_each(|(y, e)| close(isa, y / 100.0, e / 100.0));
                }
            }
        }
    }
}

#[test]
fn what_has_no_integers_is_computed_all_the_same() {
    let matrix = matrix(Format::Int8, 16, 64, 2);
    let list: Vec<u32> = (0..16).collect();
    let (up, down) = (matrix.part(0), matrix.part(1));
    for isa in Isa::available() {
        for (value, all) in
            [(f32::NAN, true), (f32::INFINITY, true), (0.0, false), (1e-38, false), (1e35, false)]
        {
            let mut x = vec![0.0; 64];
            x[3] = value;
            let mut out = vec![1.0; 16];
            dot_rows(isa, &up, &list, &x, &mut out);
            assert!(out.iter().all(|x| x.is_finite() != all), "{isa:?} {value}: {out:?}");
            let mut y = vec![1.0; 64];
            add_rows(isa, &down, &list, &x[..16], 0..64, &mut y);
            assert!(y.iter().all(|x| x.is_finite() != all), "{isa:?} {value}: {y:?}");
            let (mut y, mut products) = (vec![1.0; 64], vec![0.0; 16]);
            let gate = vec![1.0; 16];
            bundles(isa, (&up, &down), &list, &gate, &[], &x, &mut products, &mut y);
            assert!(products.iter().all(|x| x.is_finite() != all), "{isa:?} {value}");
            if value == 0.0 {
                assert!(out.iter().chain(&products).all(|x| *x == 0.0) && y == [1.0; 64]);
            }
        }
    }
}

#[test]
fn rows_are_decoded_as_they_are_stored() {
    for isa in Isa::available() {
        for format in Format::ALL {
            let matrix = matrix(format, 67, 200, 2);
            for part in [0, 1] {
                let (rows, decoded) = (matrix.part(part), rows_of(&matrix, part));
                for cols in [0..200, 64..200, 128..129] {
                    for list in lists(67) {
                        let stride = padded(cols.len());
                        let mut out = vec![f32::NAN; list.len() * stride];
                        decode_rows(isa, &rows, &list, cols.clone(), &mut out);
                        for (found, row) in out.chunks_exact(stride).zip(&list) {
                            let expected = &decoded[*row as usize][cols.clone()];
                            assert_eq!(&found[..cols.len()], expected, "{isa:?} {format}");
                        }
                    }
                }
            }
        }
    }
}
