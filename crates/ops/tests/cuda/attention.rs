//! Attention: every head size, every feature, packed and apart.

use candle_core::{DType, Tensor};
use relufy_ops::attention::{self, Alibi, Cols, Heads, Qkv, Run, Saved, Segment};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, gpu, on_gpu, poison};

pub fn trials() -> Trials {
    vec![
        ("attention_head_sizes", head_sizes),
        ("attention_groups", groups),
        ("attention_many_heads_of_one_key_head", many_heads_of_one_key_head),
        ("attention_documents", documents),
        ("attention_continued", continued),
        ("attention_rows_of_no_segment", rows_of_no_segment),
        ("attention_window", window),
        ("attention_alibi", alibi),
        ("attention_softcap", softcap),
        ("attention_scale", scale),
        ("attention_long", long),
        ("attention_odd_columns", odd_columns),
        ("attention_three_tensors", three_tensors),
        ("attention_prefixes", || prefixes(&[12, 64, 80, 128])),
        ("attention_nothing", nothing),
        ("attention_refuses", refuses),
        ("small_attention_64", || small(64)),
        ("small_attention_80", || small(80)),
        ("small_attention_96", || small(96)),
        ("small_attention_128", || small(128)),
        ("small_attention_256", || small(256)),
        ("small_attention_exact", small_exact),
        ("small_attention_prefixes", || prefixes(&[5, 64])),
    ]
}

/// The kernels of the tensor cores, and the exact ones in f32. A walk passes each stage more than
/// once; the second heads share their keys, whose gradients are then summed in parts.
fn small(head_dim: usize) {
    let segments = lengths(&[170, 30]);
    let plain = heads(1, 1, head_dim);
    check("one head", 200, &segments, &plain);
    check("a group", 200, &segments, &heads(2, 1, head_dim));
    check("a soft cap", 200, &segments, &Heads { softcap: Some(3.0), ..plain });
}

/// Heads that no other kernels know, in both types.
fn small_exact() {
    for head_dim in [24, 40, 100, 200, 320] {
        check(&format!("exact, {head_dim}"), 90, &lengths(&[70, 20]), &heads(2, 1, head_dim));
    }
}

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None }
}

/// Documents of these lengths one behind the other.
fn lengths(lengths: &[usize]) -> Vec<Segment> {
    let mut start = 0;
    lengths
        .iter()
        .map(|&len| {
            start += len;
            Segment::document(start - len, len)
        })
        .collect()
}

/// Forward and backward in both types against the CPU, and the same twice.
fn check(what: &str, n: usize, segments: &[Segment], heads: &Heads) {
    check_wide(what, n, segments, heads, (0, 0));
}

/// The same in a tensor with more columns before and behind.
fn check_wide(
    what: &str,
    n: usize,
    segments: &[Segment],
    heads: &Heads,
    (before, behind): (usize, usize),
) {
    let mut random = Random::new(n as u64);
    let columns = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
    let x = random.tensor((n, before + columns + behind));
    let dout = random.tensor((n, heads.heads * heads.head_dim));
    let run = |x: &Tensor, dout: &Tensor| {
        let mut qkv = Qkv::packed(x, heads);
        for cols in [&mut qkv.q, &mut qkv.k, &mut qkv.v] {
            cols.start_col += before;
        }
        let saved = attention::forward(&qkv, segments, heads).unwrap();
        let grad = attention::backward(&qkv, segments, heads, &saved, dout).unwrap();
        [saved.out, saved.lse, grad]
    };
    let expected = run(&x, &dout);
    for (dtype, tolerance) in TYPES {
        let (x, dout) = (on_gpu(&x, dtype), on_gpu(&dout, dtype));
        let found = run(&x, &dout);
        poison();
        let again = run(&x, &dout);
        assert_eq!(found[0].dtype(), dtype);
        assert_eq!(found[1].dtype(), DType::F32);
        for (i, part) in ["out", "lse", "grad"].into_iter().enumerate() {
            let what = format!("{what}, {dtype:?}, {part}");
            assert_close(&what, &found[i], &expected[i], tolerance);
            assert_same(&what, &found[i], &again[i]);
        }
        // A small part must not hide behind a large one.
        let parts = [heads.heads, heads.kv_heads, heads.kv_heads];
        let mut start = before;
        for (part, count) in ["dq", "dk", "dv"].into_iter().zip(parts) {
            let len = count * heads.head_dim;
            let of = |t: &Tensor| t.narrow(1, start, len).unwrap().contiguous().unwrap();
            let what = format!("{what}, {dtype:?}, {part}");
            assert_close(&what, &of(&found[2]), &of(&expected[2]), tolerance);
            start += len;
        }
    }
}

fn head_sizes() {
    for head_dim in [8, 16, 32, 48, 64, 80, 96, 100, 128, 192, 256, 320] {
        let segments = lengths(&[200, 129]);
        check(&format!("head_dim {head_dim}"), 329, &segments, &heads(2, 2, head_dim));
    }
}

fn groups() {
    for head_dim in [32, 64, 128, 256] {
        for (all, kv) in [(4, 2), (6, 2), (5, 1)] {
            let what = format!("{kv} of {all} heads of {head_dim}");
            check(&what, 260, &lengths(&[140, 120]), &heads(all, kv, head_dim));
        }
    }
}

/// So few tiles of keys that the heads are cut into parts.
fn many_heads_of_one_key_head() {
    for head_dim in [64, 80] {
        check(&format!("71 heads of {head_dim}"), 150, &lengths(&[150]), &heads(71, 1, head_dim));
    }
}

fn documents() {
    for head_dim in [48, 64, 128] {
        let segments = lengths(&[1, 63, 64, 65, 127, 128, 129, 2, 17]);
        check(&format!("documents, {head_dim}"), 596, &segments, &heads(3, 3, head_dim));
    }
}

fn continued() {
    for head_dim in [48, 64, 80, 96, 128, 256] {
        for cut in [None, Some(50)] {
            let segments = [
                Segment::continued((10, 100), (0, 150)),
                Segment::continued((120, 1), (150, 90)),
                Segment::continued((130, 7), (245, 135)),
                // Keys without queries.
                Segment::continued((200, 0), (380, 5)),
            ];
            let heads = Heads { window: cut, ..heads(4, 2, head_dim) };
            check(&format!("continued, {head_dim}, {cut:?}"), 400, &segments, &heads);
        }
    }
}

fn rows_of_no_segment() {
    for head_dim in [32, 64, 128] {
        let segments = [Segment::document(5, 70), Segment::document(90, 130)];
        check(&format!("gaps, {head_dim}"), 230, &segments, &heads(2, 1, head_dim));
        check(&format!("no segment, {head_dim}"), 30, &[], &heads(2, 1, head_dim));
    }
}

fn window() {
    for head_dim in [48, 64, 80, 128, 256] {
        for window in [2, 40, 64, 129, 1000] {
            let heads = Heads { window: Some(window), ..heads(2, 1, head_dim) };
            check(&format!("window {window}, {head_dim}"), 320, &lengths(&[300, 20]), &heads);
        }
    }
}

fn alibi() {
    for head_dim in [48, 64, 80, 96, 128, 256] {
        for bf16 in [false, true] {
            let alibi = Alibi { slopes: vec![0.5, 0.07, 0.003, 0.2], factor: 0.7, bf16 };
            let heads = Heads { alibi: Some(alibi), window: Some(250), ..heads(4, 2, head_dim) };
            check(&format!("ALiBi, bf16 {bf16}, {head_dim}"), 350, &lengths(&[290, 60]), &heads);
        }
    }
}

fn softcap() {
    for head_dim in [48, 64, 80, 96, 128, 256] {
        let heads = Heads { softcap: Some(3.0), ..heads(2, 1, head_dim) };
        check(&format!("soft cap, {head_dim}"), 270, &lengths(&[200, 70]), &heads);
        let alibi = Some(Alibi::from(vec![0.1, 0.01]));
        let heads = Heads { alibi, window: Some(90), ..heads };
        check(&format!("soft cap and ALiBi, {head_dim}"), 270, &lengths(&[200, 70]), &heads);
    }
}

/// Factors that are not positive turn the order of the scores around.
fn scale() {
    for scale in [-0.1, 0.0, 0.02] {
        for head_dim in [32, 64] {
            let heads = Heads { scale, ..heads(2, 2, head_dim) };
            check(&format!("scale {scale}, {head_dim}"), 150, &lengths(&[150]), &heads);
        }
    }
}

/// Enough tiles that each stage is filled many times.
fn long() {
    for head_dim in [64, 128] {
        check(&format!("long, {head_dim}"), 1100, &lengths(&[1037, 63]), &heads(2, 1, head_dim));
    }
}

/// Columns that vectors do not fit, and that take no part.
fn odd_columns() {
    for (before, behind) in [(8, 16), (3, 0), (0, 5), (1, 1)] {
        for head_dim in [32, 64] {
            let what = format!("{before} columns before, {behind} behind, {head_dim}");
            let heads = heads(3, 1, head_dim);
            check_wide(&what, 140, &lengths(&[100, 40]), &heads, (before, behind));
        }
    }
}

fn assert_saved(what: &str, found: &Saved, expected: &Saved, tolerance: f64) {
    assert_close(&format!("{what}, out"), &found.out, &expected.out, tolerance);
    assert_close(&format!("{what}, lse"), &found.lse, &expected.lse, tolerance);
}

/// Queries, keys and values of tensors of their own: a cache.
fn three_tensors() {
    for head_dim in [40, 64, 128] {
        let heads = heads(4, 2, head_dim);
        let mut random = Random::new(7);
        let width = heads.kv_heads * head_dim;
        let q = random.tensor((9, 4 * head_dim + 8));
        let (k, v) = (random.tensor((300, width)), random.tensor((310, width + 16)));
        let segments = [
            Segment::continued((0, 1), (0, 170)),
            Segment::continued((2, 6), (170, 128)),
            // Shares keys with the first.
            Segment::continued((8, 1), (3, 166)),
        ];
        let run = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let cols = |tensor, start_col| Cols { tensor, start_col };
            let qkv = Qkv { q: cols(q, 8), k: cols(k, 0), v: cols(v, 16) };
            attention::forward(&qkv, &segments, &heads).unwrap()
        };
        let expected = run(&q, &k, &v);
        for (dtype, tolerance) in TYPES {
            let found = run(&on_gpu(&q, dtype), &on_gpu(&k, dtype), &on_gpu(&v, dtype));
            assert_saved(
                &format!("three tensors, {head_dim}, {dtype:?}"),
                &found,
                &expected,
                tolerance,
            );
        }
    }
}

fn prefixes(head_dims: &[usize]) {
    let run = |start, len| Run { start, len };
    for &head_dim in head_dims {
        for window in [None, Some(45)] {
            let heads = Heads { window, ..heads(4, 2, head_dim) };
            let x = Random::new(3).tensor((400, 8 * head_dim));
            let segments = [
                Segment::document(0, 100),
                Segment::document(100, 33).after([run(0, 90)]),
                Segment::document(133, 130).after([run(20, 60), run(0, 10), run(100, 3)]),
                Segment::document(300, 1).after([run(0, 100)]),
                Segment::continued((310, 2), (308, 4)).after([run(7, 1)]),
            ];
            let forward = |x: &Tensor| {
                attention::forward(&Qkv::packed(x, &heads), &segments, &heads).unwrap()
            };
            let expected = forward(&x);
            for (dtype, tolerance) in TYPES {
                let x = on_gpu(&x, dtype);
                let (found, again) = (forward(&x), forward(&x));
                let what = format!("prefixes, {head_dim}, {window:?}, {dtype:?}");
                assert_saved(&what, &found, &expected, tolerance);
                assert_same(&what, &found.out, &again.out);
            }
        }
    }
}

fn nothing() {
    for (dtype, _) in TYPES {
        let heads = heads(2, 1, 64);
        let x = Tensor::zeros((4, 4 * 64), dtype, gpu()).unwrap();
        let qkv = Qkv::packed(&x, &heads);
        let saved = attention::forward(&qkv, &[], &heads).unwrap();
        let dout = Tensor::ones((4, 128), dtype, gpu()).unwrap();
        let grad = attention::backward(&qkv, &[], &heads, &saved, &dout).unwrap();
        for t in [&saved.out, &saved.lse, &grad] {
            let sum = t.to_dtype(DType::F32).unwrap().abs().unwrap().sum_all().unwrap();
            assert_eq!(sum.to_scalar::<f32>().unwrap(), 0.0);
        }
    }
}

fn refuses() {
    let x = Tensor::zeros((4, 4 * 64), DType::F16, gpu()).unwrap();
    let small = heads(2, 1, 64);
    let documents = lengths(&[4]);
    assert!(attention::forward(&Qkv::packed(&x, &small), &documents, &small).is_err());
    let wide = heads(1, 1, 520);
    let x = Tensor::zeros((4, 3 * 520), DType::BF16, gpu()).unwrap();
    assert!(attention::forward(&Qkv::packed(&x, &wide), &documents, &wide).is_err());
}
