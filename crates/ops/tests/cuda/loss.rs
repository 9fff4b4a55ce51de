//! The head with its loss, its gradients, a teacher, and scores.

use candle_core::{DType, Tensor};
use relufy_ops::Accum;
use relufy_ops::loss::{self, Backward, Head, IGNORE, LossOut, Teacher};

use crate::common::{Random, TYPES, Trials, assert_close, assert_same, nan, on_gpu};

pub fn trials() -> Trials {
    vec![
        ("loss_matches_the_cpu", || matches_the_cpu(&SIZES)),
        ("loss_with_a_teacher", || with_a_teacher(90, 515)),
        ("loss_of_few_or_no_targets", few_or_no_targets),
        ("loss_scores_tokens", scores_tokens),
        ("loss_repeats", repeats),
        ("loss_of_rows_of_any_length", rows_of_any_length),
        ("loss_that_is_no_number_shows", no_number_shows),
        ("small_loss", small),
    ]
}

/// Rows that fit into registers and such as do not.
fn small() {
    matches_the_cpu(&[(9, 24, 130), (3, 8, 9000), (3, 8, 50_257)]);
    with_a_teacher(7, 130);
    scores_tokens();
}

const SIZES: [(usize, usize, usize); 4] =
    [(1, 16, 9), (37, 24, 130), (200, 64, 1003), (65, 40, 50_257)];

/// Hidden states and a head whose logits are of an ordinary size.
fn inputs(random: &mut Random, n: usize, width: usize, vocab: usize) -> [Tensor; 3] {
    let h = random.tensor((n, width));
    let w = (random.tensor((vocab, width)) * 0.125).unwrap();
    [h, w, random.tensor(vocab)]
}

fn head<'a>(weight: &'a Tensor, bias: &'a Tensor) -> Head<'a> {
    Head { weight, bias: Some(bias), softcap: None }
}

struct Found {
    out: LossOut,
    dw: Tensor,
    db: Tensor,
}

/// Loss and gradients; `nan` makes the destinations.
fn run(
    (h, head): (&Tensor, &Head<'_>),
    targets: &[i64],
    teacher: Option<&Teacher<'_>>,
    room: impl Fn(&[usize]) -> Tensor,
) -> Found {
    let (dw, db) = (room(head.weight.dims()), room(&head.weight.dims()[..1]));
    let vocab = head.weight.dims()[0];
    let backward = Backward {
        scale: 0.5,
        dweight: Some((0..vocab, (&dw, Accum::Overwrite))),
        dbias: head.bias.map(|_| (&db, Accum::Overwrite)),
    };
    let out = loss::cross_entropy(h, head, targets, teacher, Some(&backward)).unwrap();
    Found { out, dw, db }
}

#[track_caller]
fn close(found: &Found, expected: &Found, with_bias: bool, tolerance: f64) {
    let dh = |f: &Found| f.out.dh.clone().unwrap();
    assert_eq!(found.out.count, expected.out.count);
    for (found, expected) in
        [(found.out.sum, expected.out.sum), (found.out.kl_sum, expected.out.kl_sum)]
    {
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{found} {expected}"
        );
    }
    assert_close("dh", &dh(found), &dh(expected), tolerance);
    assert_close("dw", &found.dw, &expected.dw, tolerance);
    if with_bias {
        assert_close("db", &found.db, &expected.db, tolerance);
    }
}

fn cpu_room(dims: &[usize]) -> Tensor {
    Tensor::full(f32::NAN, dims, &candle_core::Device::Cpu).unwrap()
}

fn matches_the_cpu(sizes: &[(usize, usize, usize)]) {
    for (seed, &(n, width, vocab)) in sizes.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let [h, w, b] = inputs(&mut random, n, width, vocab);
        let mut targets: Vec<i64> =
            random.ids(n, vocab as u32).into_iter().map(i64::from).collect();
        for target in targets.iter_mut().skip(3).step_by(11) {
            *target = IGNORE;
        }
        for (with_bias, softcap) in [(false, None), (true, Some(3.0))] {
            let bias = if with_bias { Some(&b) } else { None };
            let expected_head = Head { weight: &w, bias, softcap };
            let expected = run((&h, &expected_head), &targets, None, cpu_room);
            for (dtype, tolerance) in TYPES {
                let [h, w, b] = [&h, &w, &b].map(|t| on_gpu(t, dtype));
                let head =
                    Head { weight: &w, bias: if with_bias { Some(&b) } else { None }, softcap };
                let found = run((&h, &head), &targets, None, |dims| nan(dims, dtype));
                close(&found, &expected, with_bias, tolerance);
                let quiet = loss::cross_entropy(&h, &head, &targets, None, None).unwrap();
                assert_eq!(quiet.sum.to_bits(), found.out.sum.to_bits());
            }
        }
    }
}

fn with_a_teacher(n: usize, vocab: usize) {
    let mut random = Random::new(20);
    let [h, w, b] = inputs(&mut random, n, 32, vocab);
    let [th, tw, tb] = inputs(&mut random, n, 48, vocab);
    let targets: Vec<i64> = random.ids(n, vocab as u32).into_iter().map(i64::from).collect();
    fn teacher<'a>(hidden: &'a Tensor, weight: &'a Tensor, bias: &'a Tensor) -> Teacher<'a> {
        Teacher { hidden, head: head(weight, bias), temperature: 1.7, weight: 0.3 }
    }
    let expected = run((&h, &head(&w, &b)), &targets, Some(&teacher(&th, &tw, &tb)), cpu_room);
    for (dtype, tolerance) in TYPES {
        let [h, w, b, th, tw, tb] = [&h, &w, &b, &th, &tw, &tb].map(|t| on_gpu(t, dtype));
        let teacher = teacher(&th, &tw, &tb);
        let found = run((&h, &head(&w, &b)), &targets, Some(&teacher), |dims| nan(dims, dtype));
        close(&found, &expected, true, 2.0 * tolerance);
    }
}

fn few_or_no_targets() {
    let mut random = Random::new(30);
    let (n, vocab) = (64, 77);
    let [h, w, b] = inputs(&mut random, n, 24, vocab);
    for wanted in [0, 1, 5] {
        let mut targets = vec![IGNORE; n];
        for k in 0..wanted {
            targets[k * 12 + 3] = (k * 7) as i64;
        }
        let expected = run((&h, &head(&w, &b)), &targets, None, cpu_room);
        for (dtype, tolerance) in TYPES {
            let [h, w, b] = [&h, &w, &b].map(|t| on_gpu(t, dtype));
            let found = run((&h, &head(&w, &b)), &targets, None, |dims| nan(dims, dtype));
            close(&found, &expected, true, tolerance);
        }
    }
}

fn scores_tokens() {
    let mut random = Random::new(40);
    let (n, vocab) = (50, 1030);
    let [h, w, b] = inputs(&mut random, n, 40, vocab);
    let wanted: Vec<(u32, u32)> =
        random.ids(120, n as u32).into_iter().zip(random.ids(120, vocab as u32)).collect();
    fn head<'a>(weight: &'a Tensor, bias: &'a Tensor) -> Head<'a> {
        Head { softcap: Some(5.0), ..super::loss::head(weight, bias) }
    }
    let expected = loss::score_tokens(&h, &head(&w, &b), &wanted).unwrap();
    let greedy = loss::greedy_tokens(&h, &head(&w, &b)).unwrap();
    let logits = loss::logits(&h, &head(&w, &b)).unwrap();
    for (dtype, tolerance) in TYPES {
        let [h, w, b] = [&h, &w, &b].map(|t| on_gpu(t, dtype));
        let head = head(&w, &b);
        for (found, expected) in
            loss::score_tokens(&h, &head, &wanted).unwrap().iter().zip(&expected)
        {
            let far = f64::from((found.logprob - expected.logprob).abs());
            assert!(
                far <= tolerance * f64::from(expected.logprob.abs()).max(1.0),
                "{found:?} {expected:?}"
            );
            assert!(dtype != DType::F32 || found.greedy == expected.greedy);
        }
        assert_close("logits", &loss::logits(&h, &head).unwrap(), &logits, tolerance);
        if dtype == DType::F32 {
            assert_eq!(loss::greedy_tokens(&h, &head).unwrap(), greedy);
        }
    }
    let mut broken = relufy_ops::buffer::to_host(&h).unwrap();
    broken[40] = f32::NAN;
    let h =
        on_gpu(&Tensor::from_vec(broken, (n, 40), &candle_core::Device::Cpu).unwrap(), DType::F32);
    let (w, b) = (on_gpu(&w, DType::F32), on_gpu(&b, DType::F32));
    let found = loss::greedy_tokens(&h, &head(&w, &b)).unwrap();
    assert_eq!((found[0], found[1], found[2]), (greedy[0], None, greedy[2]));
}

fn repeats() {
    let mut random = Random::new(50);
    let [h, w, b] = inputs(&mut random, 300, 64, 2000).map(|t| on_gpu(&t, DType::BF16));
    let targets: Vec<i64> = random.ids(300, 2000).into_iter().map(i64::from).collect();
    let head = Head { weight: &w, bias: Some(&b), softcap: None };
    let once = || run((&h, &head), &targets, None, |dims| nan(dims, DType::BF16));
    let (one, other) = (once(), once());
    assert_eq!(one.out.sum.to_bits(), other.out.sum.to_bits());
    assert_same("dw", &one.dw, &other.dw);
    assert_same("db", &one.db, &other.db);
    assert_same("dh", &one.out.dh.unwrap(), &other.out.dh.unwrap());
}

/// Rows in registers, in shared memory and in neither, in f32 and bf16, at the edges too.
fn rows_of_any_length() {
    let vocabs =
        [1, 8, 4096, 8191, 32_000, 32_767, 32_768, 32_769, 57_344, 65_024, 113_000, 128_256];
    for (seed, vocab) in vocabs.into_iter().enumerate() {
        let mut random = Random::new(100 + seed as u64);
        // More rows than the GPU has multiprocessors, with one ignored now and then.
        let (n, width) = (300, 16);
        let [h, w, _] = inputs(&mut random, n, width, vocab);
        let mut targets: Vec<i64> =
            random.ids(n, vocab as u32).into_iter().map(i64::from).collect();
        targets[0] = vocab as i64 - 1;
        for target in targets.iter_mut().skip(5).step_by(17) {
            *target = IGNORE;
        }
        fn plain(weight: &Tensor) -> Head<'_> {
            Head { weight, bias: None, softcap: None }
        }
        let expected = run((&h, &plain(&w)), &targets, None, cpu_room);
        for (dtype, tolerance) in TYPES {
            let (h, w) = (on_gpu(&h, dtype), on_gpu(&w, dtype));
            let head = plain(&w);
            let once = || run((&h, &head), &targets, None, |dims| nan(dims, dtype));
            let (found, again) = (once(), once());
            close(&found, &expected, false, tolerance);
            assert_eq!(found.out.sum.to_bits(), again.out.sum.to_bits());
            assert_same("dh", &found.out.dh.unwrap(), &again.out.dh.unwrap());
            let quiet = loss::cross_entropy(&h, &head, &targets, None, None).unwrap();
            assert_eq!(quiet.sum.to_bits(), found.out.sum.to_bits());
        }
    }
}

fn no_number_shows() {
    let mut random = Random::new(200);
    for vocab in [500, 40_000, 128_000] {
        let [h, w, _] = inputs(&mut random, 20, 16, vocab);
        let mut broken = relufy_ops::buffer::to_host(&h).unwrap();
        broken[7 * 16 + 3] = f32::NAN;
        let h = Tensor::from_vec(broken, (20, 16), &candle_core::Device::Cpu).unwrap();
        let targets: Vec<i64> = random.ids(20, vocab as u32).into_iter().map(i64::from).collect();
        for (dtype, _) in TYPES {
            let (h, w) = (on_gpu(&h, dtype), on_gpu(&w, dtype));
            let head = Head { weight: &w, bias: None, softcap: None };
            let found = run((&h, &head), &targets, None, |dims| nan(dims, dtype));
            assert!(found.out.sum.is_nan());
            let dh = crate::common::values(&found.out.dh.unwrap());
            for (row, cells) in dh.chunks(16).enumerate() {
                assert_eq!(cells.iter().any(|x| x.is_nan()), row == 7);
            }
        }
    }
}
