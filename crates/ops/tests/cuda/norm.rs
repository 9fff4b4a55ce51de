//! Norms over rows and heads.

use candle_core::{DType, Tensor};
use relufy_ops::norm::{self, Norm, NormKind};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::{Accum, Error};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, nan, on_gpu};

pub fn trials() -> Trials {
    vec![
        ("norm_matches_the_cpu", matches_the_cpu),
        ("norm_with_any_curve", with_any_curve),
        ("norm_of_many_rows", of_many_rows),
        ("norm_of_views", of_views),
        ("norm_of_no_rows", of_no_rows),
        ("norm_of_heads", of_heads),
        ("norm_repeats", repeats),
        ("norm_refuses_another_device", refuses_another_device),
        ("small_norm", small),
    ]
}

/// Each number of vectors a thread, with each kind of curve.
fn small() {
    for width in [7, 64, 136, 264, 384, 512, 768, 1024, 2048] {
        let cpu = Case::new(13, width, width as u64);
        for post in [Pointwise::Identity, Pointwise::Relu, Pointwise::Silu] {
            let rms = NormKind::Rms { unit_offset: true };
            compare(&cpu, (rms, post, false), Accum::Add, on_gpu);
            for bias in [false, true] {
                compare(&cpu, (NormKind::Layer, post, bias), Accum::Overwrite, on_gpu);
            }
        }
    }
}

const KINDS: [NormKind; 3] =
    [NormKind::Layer, NormKind::Rms { unit_offset: false }, NormKind::Rms { unit_offset: true }];
/// A gradient of weights may be of another type than the activations.
const GRADIENTS: [DType; 2] = [DType::F32, DType::BF16];

/// Input, weight, bias and the output's gradient.
struct Case {
    x: Tensor,
    w: Tensor,
    b: Tensor,
    dy: Tensor,
}

impl Case {
    fn new(n: usize, width: usize, seed: u64) -> Case {
        let mut random = Random::new(seed);
        let (x, w, b) = (random.tensor((n, width)), random.tensor(width), random.tensor(width));
        Case { x, w, b, dy: random.tensor((n, width)) }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Case {
        Case { x: f(&self.x), w: f(&self.w), b: f(&self.b), dy: f(&self.dy) }
    }

    fn norm(&self, kind: NormKind, post: Pointwise, bias: bool) -> Norm<'_> {
        Norm { kind, eps: 1e-3, weight: &self.w, bias: bias.then_some(&self.b), post }
    }

    /// The output; the gradients of x, weight and bias, written over or added to the rooms.
    fn run(&self, norm: &Norm<'_>, rooms: &[Tensor; 3], accum: Accum) -> Tensor {
        let (y, stats) = norm::forward(&self.x, norm).unwrap();
        assert_same("again", &norm::again(&self.x, norm, &stats).unwrap(), &y);
        let [dx, dw, db] = rooms.each_ref().map(|room| (room, accum));
        let db = norm.bias.is_some().then_some(db);
        norm::backward(&self.x, norm, &stats, &self.dy, dx, Some(dw), db).unwrap();
        y
    }
}

/// One norm on both devices; `place` copies the CPU's tensors to the GPU.
fn compare(
    cpu: &Case,
    (kind, post, bias): (NormKind, Pointwise, bool),
    accum: Accum,
    place: impl Fn(&Tensor, DType) -> Tensor,
) {
    let (n, width) = cpu.x.dims2().unwrap();
    let mut random = Random::new(99);
    let there = [random.tensor((n, width)), random.tensor(width), random.tensor(width)];
    let expected = there.each_ref().map(|t| t.copy().unwrap());
    let y = cpu.run(&cpu.norm(kind, post, bias), &expected, accum);
    for (dtype, tolerance) in TYPES {
        let gpu = cpu.map(|t| place(t, dtype));
        for gradient in GRADIENTS {
            let what = format!("{n} x {width} {kind:?} {post:?} {bias} {dtype:?} {gradient:?}");
            let rooms = [(&there[0], dtype), (&there[1], gradient), (&there[2], gradient)];
            let rooms = rooms.map(|(there, dtype)| match accum {
                Accum::Overwrite => {
                    let nan = Tensor::full(f32::NAN, there.shape(), there.device()).unwrap();
                    place(&nan, dtype)
                }
                Accum::Add => place(there, dtype),
            });
            let found = gpu.run(&gpu.norm(kind, post, bias), &rooms, accum);
            assert_close(&format!("y {what}"), &found, &y, tolerance);
            assert_close(&format!("dx {what}"), &rooms[0], &expected[0], tolerance);
            let tolerance = if gradient == DType::BF16 { 1e-2 } else { tolerance };
            assert_close(&format!("dweight {what}"), &rooms[1], &expected[1], tolerance);
            if bias {
                assert_close(&format!("dbias {what}"), &rooms[2], &expected[2], tolerance);
            }
        }
    }
}

/// Widths of each number of vectors and threads, odd ones, and such as no block holds.
const WIDTHS: [usize; 26] = [
    3, 7, 8, 30, 32, 64, 96, 128, 200, 256, 768, 1000, 1024, 1536, 2048, 2050, 2560, 3072, 4096,
    4544, 5632, 8192, 9001, 12_288, 16_384, 33_000,
];

fn matches_the_cpu() {
    for width in WIDTHS {
        // Few elements, so that none is so near a ReLU's kink that rounding decides.
        let n = if width > 4096 { 3 } else { 13 };
        for (i, &kind) in KINDS.iter().enumerate() {
            let cpu = Case::new(n, width, width as u64);
            for (post, accum) in
                [(Pointwise::Identity, Accum::Add), (Pointwise::Relu, Accum::Overwrite)]
            {
                let bias = (i + width).is_multiple_of(2) == (post == Pointwise::Relu);
                compare(&cpu, (kind, post, bias), accum, on_gpu);
            }
        }
    }
}

fn with_any_curve() {
    let curves = [
        Pointwise::Silu,
        Pointwise::GeluTanh,
        Pointwise::ShiftedRelu { shift: 0.25 },
        Pointwise::FatRelu { threshold: 0.25 },
    ];
    for (width, bias) in [(24, false), (61, true), (768, false), (1536, true), (4096, false)] {
        for post in curves {
            let cpu = Case::new(9, width, 5);
            compare(&cpu, (NormKind::Layer, post, bias), Accum::Overwrite, on_gpu);
        }
    }
}

/// More rows than the blocks take at a time, so that each has several.
fn of_many_rows() {
    for (n, width) in [(20_011, 64), (5003, 768), (4099, 1024), (2003, 2048), (20_011, 9)] {
        let cpu = Case::new(n, width, 6);
        let rms = NormKind::Rms { unit_offset: false };
        compare(&cpu, (rms, Pointwise::Relu, false), Accum::Add, on_gpu);
        compare(&cpu, (NormKind::Layer, Pointwise::Identity, true), Accum::Overwrite, on_gpu);
    }
}

/// The last rows of a larger tensor.
fn after_a_row(t: &Tensor, dtype: DType) -> Tensor {
    let rows = t.dims()[0];
    let more = Tensor::cat(&[&t.narrow(0, 0, 1).unwrap(), t], 0).unwrap();
    on_gpu(&more, dtype).narrow(0, 1, rows).unwrap()
}

fn of_views() {
    for width in [5, 64, 768] {
        let cpu = Case::new(21, width, 7);
        let all = (NormKind::Layer, Pointwise::Relu, true);
        compare(&cpu, all, Accum::Overwrite, after_a_row);
        compare(&cpu, all, Accum::Add, |t, dtype| match t.rank() {
            2 => after_a_row(t, dtype),
            _ => on_gpu(t, dtype),
        });
    }
}

fn of_no_rows() {
    let cpu = Case::new(0, 64, 8);
    compare(&cpu, (NormKind::Layer, Pointwise::Identity, true), Accum::Overwrite, on_gpu);
}

fn of_heads() {
    // Rows, width, columns, head_dim; the fourth has no aligned head, the last several per warp.
    let cases = [
        (11, 40, 8..32, 8),
        (50, 512, 0..384, 128),
        (3000, 512, 128..448, 64),
        (23, 75, 3..73, 7),
        (9, 400, 0..320, 80),
        (0, 64, 0..64, 16),
        (700, 96, 32..96, 16),
    ];
    for (n, width, cols, dim) in cases {
        for kind in KINDS {
            let mut random = Random::new(9);
            let (x, dy, w) =
                (random.tensor((n, width)), random.tensor((n, width)), random.tensor(dim));
            let run = |x: &Tensor, dy: &Tensor, w: &Tensor, dw: &Tensor| {
                let post = Pointwise::Identity;
                let norm = Norm { kind, eps: 1e-3, weight: w, bias: None, post };
                let stats = norm::forward_heads(x, cols.clone(), dim, &norm).unwrap();
                let dw = Some((dw, Accum::Overwrite));
                norm::backward_heads(dy, cols.clone(), dim, &norm, &stats, dw).unwrap();
            };
            let expected = (x.copy().unwrap(), dy.copy().unwrap(), w.copy().unwrap());
            run(&expected.0, &expected.1, &w, &expected.2);
            for (dtype, tolerance) in TYPES {
                for gradient in GRADIENTS {
                    let what = format!("{n} x {width} {cols:?} {dim} {kind:?} {dtype:?}");
                    let found = (on_gpu(&x, dtype), on_gpu(&dy, dtype), nan(dim, gradient));
                    run(&found.0, &found.1, &on_gpu(&w, dtype), &found.2);
                    assert_close(&format!("y {what}"), &found.0, &expected.0, tolerance);
                    assert_close(&format!("dx {what}"), &found.1, &expected.1, tolerance);
                    let tolerance = if gradient == DType::BF16 { 1e-2 } else { tolerance };
                    assert_close(&format!("dweight {what}"), &found.2, &expected.2, tolerance);
                }
            }
        }
    }
}

fn repeats() {
    for width in [50, 768, 2048, 4096] {
        let case = Case::new(3001, width, 10).map(|t| on_gpu(t, DType::BF16));
        let norm = case.norm(NormKind::Layer, Pointwise::Relu, true);
        let run = || {
            let rooms =
                [nan((3001, width), DType::BF16), nan(width, DType::F32), nan(width, DType::F32)];
            let y = case.run(&norm, &rooms, Accum::Overwrite);
            (y, rooms)
        };
        let (one, other) = (run(), run());
        assert_same("y", &one.0, &other.0);
        for (one, other) in one.1.iter().zip(&other.1) {
            assert_same("gradient", one, other);
        }
    }
}

fn refuses_another_device() {
    let cpu = Case::new(3, 16, 11);
    let norm = cpu.norm(NormKind::Layer, Pointwise::Identity, false);
    let mixed = norm::forward(&on_gpu(&cpu.x, DType::F32), &norm);
    assert!(matches!(mixed, Err(Error::NoKernel { .. })));
    let (_, stats) = norm::forward(&cpu.x, &norm).unwrap();
    let gpu = cpu.map(|t| on_gpu(t, DType::F32));
    let norm = gpu.norm(NormKind::Layer, Pointwise::Identity, false);
    let again = norm::again(&gpu.x, &norm, &stats);
    assert!(matches!(again, Err(Error::Shape { tensor: "stats", .. })));
}
