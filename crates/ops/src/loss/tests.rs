//! Against the same formula in f64 with candle's autograd, and against central differences of that
//! formula.

use candle_core::{D, DType, Device, Tensor, Var};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn f64s(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F64).unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn log_softmax(x: &Tensor) -> Tensor {
    let max = x.max_keepdim(D::Minus1).unwrap().detach();
    let x = x.broadcast_sub(&max).unwrap();
    x.broadcast_sub(&x.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap()).unwrap()
}

fn plain_logits(h: &Tensor, w: &Tensor, b: Option<&Tensor>, cap: Option<f32>) -> Tensor {
    let mut logits = h.matmul(&w.t().unwrap()).unwrap();
    if let Some(b) = b {
        logits = logits.broadcast_add(b).unwrap();
    }
    match cap.map(f64::from) {
        Some(cap) => ((logits / cap).unwrap().tanh().unwrap() * cap).unwrap(),
        None => logits,
    }
}

/// Summed cross-entropy and divergence over the rows with a target.
fn plain(logits: &Tensor, targets: &[i64], taught: Option<(&Tensor, f32)>) -> (Tensor, Tensor) {
    let (n, vocab) = logits.dims2().unwrap();
    let picked: Vec<f64> = (0..n * vocab)
        .map(|c| f64::from(u8::from(targets[c / vocab] == (c % vocab) as i64)))
        .collect();
    let picked = Tensor::from_vec(picked, (n, vocab), logits.device()).unwrap();
    let ce = (log_softmax(logits) * picked).unwrap().sum_all().unwrap().neg().unwrap();
    let Some((taught, temperature)) = taught else {
        return (ce.clone(), ce.zeros_like().unwrap());
    };
    let active: Vec<f64> = targets.iter().map(|&t| f64::from(u8::from(t != IGNORE))).collect();
    let active = Tensor::from_vec(active, (n, 1), logits.device()).unwrap();
    let at = |x: &Tensor| log_softmax(&(x / f64::from(temperature)).unwrap());
    let (a, b) = (at(taught), at(logits));
    let kl = (a.exp().unwrap() * (a - b).unwrap()).unwrap().broadcast_mul(&active).unwrap();
    (ce, kl.sum_all().unwrap())
}

fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let max = |t: &Tensor| -> f64 {
        t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    };
    max(&(f64s(found) - expected).unwrap()) / max(expected).max(1e-3)
}

struct Case {
    n: usize,
    width: usize,
    vocab: usize,
    bias: bool,
    softcap: Option<f32>,
    /// Temperature and weight.
    teacher: Option<(f32, f32)>,
    /// Every how many-th row is ignored; 0 for none.
    ignored: usize,
}

/// Loss and all gradients of random data against the formula, gradients once overwritten and once
/// added.
fn check(seed: u64, case: &Case) {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let Case { n, width, vocab, .. } = *case;
    let h = random(rng, &[n, width]);
    let weight = random(rng, &[vocab, width]);
    let bias = case.bias.then(|| random(rng, &[vocab]));
    let targets: Vec<i64> = (0..n)
        .map(|i| match case.ignored {
            k if k > 0 && i % k == 0 => IGNORE,
            _ => rng.random_range(0..vocab as i64),
        })
        .collect();
    let (hidden, teacher_weight) = (random(rng, &[n, width + 1]), random(rng, &[vocab, width + 1]));
    let head = Head { weight: &weight, bias: bias.as_ref(), softcap: case.softcap };
    let teacher = case.teacher.map(|(temperature, weight)| {
        let head = Head { weight: &teacher_weight, bias: bias.as_ref(), softcap: Some(3.0) };
        Teacher { hidden: &hidden, head, temperature, weight }
    });

    let (vh, vw) =
        (Var::from_tensor(&f64s(&h)).unwrap(), Var::from_tensor(&f64s(&weight)).unwrap());
    let vb = Var::from_tensor(&bias.as_ref().map_or(f64s(&h), f64s)).unwrap();
    let wide_bias = bias.as_ref().map(f64s);
    let taught =
        plain_logits(&f64s(&hidden), &f64s(&teacher_weight), wide_bias.as_ref(), Some(3.0));
    let objective = |h: &Tensor, w: &Tensor, b: &Tensor| {
        let logits = plain_logits(h, w, case.bias.then_some(b), case.softcap);
        let (ce, kl) = plain(&logits, &targets, case.teacher.map(|(t, _)| (&taught, t)));
        let (t, w) = case.teacher.map_or((1.0, 0.0), |(t, w)| (f64::from(t), f64::from(w)));
        let total = ((&ce * (1.0 - w)).unwrap() + (&kl * (w * t * t)).unwrap()).unwrap();
        [ce, kl, total]
    };
    let [ce, kl, total] = objective(&vh, &vw, &vb);
    let [ce, kl, value] = [ce, kl, total.clone()].map(|t| t.to_scalar::<f64>().unwrap());
    let grads = total.backward().unwrap();
    let grad = |var: &Var| grads.get(var).cloned().unwrap_or_else(|| var.zeros_like().unwrap());

    let alone = cross_entropy(&h, &head, &targets, teacher.as_ref(), None).unwrap();
    let near = |found: f64, expected: f64| (found - expected).abs() <= 1e-6 * (n as f64 + expected);
    assert!(near(alone.sum, ce) && near(alone.kl_sum, kl), "{alone:?}, expected {ce} {kl}");
    assert_eq!(alone.count, targets.iter().filter(|&&t| t != IGNORE).count());
    assert!(alone.dh.is_none());
    if let Some(teacher) = &teacher {
        let found = teacher.objective(alone.sum, alone.kl_sum);
        assert!((found - value).abs() <= 1e-5 * (n as f64 + value));
    }

    // Rows first.. of dW, first overwriting NaN, then adding twice as much.
    let first = vocab / 3;
    let dw = (weight.zeros_like().unwrap() + f64::NAN).unwrap();
    let db = Tensor::full(f32::NAN, vocab, &Device::Cpu).unwrap();
    let mut dh = None;
    for (scale, accum) in [(0.25, Accum::Overwrite), (0.5, Accum::Add)] {
        let dweight = Some((first..vocab, (&dw, accum)));
        let dbias = case.bias.then_some((&db, accum));
        let backward = Backward { scale, dweight, dbias };
        let out = cross_entropy(&h, &head, &targets, teacher.as_ref(), Some(&backward)).unwrap();
        assert!(near(out.sum, ce) && near(out.kl_sum, kl));
        dh = out.dh;
    }
    let dh = (dh.unwrap() / 0.5).unwrap();
    assert!(difference(&dh, &grad(&vh)) < 1e-5, "dh {:e}", difference(&dh, &grad(&vh)));
    for (row, target) in dh.to_vec2::<f32>().unwrap().iter().zip(&targets) {
        assert!(*target != IGNORE || row.iter().all(|&x| x == 0.0));
    }
    assert!(floats(&dw)[..first * width].iter().all(|x| x.is_nan()), "rows outside were touched");
    let rows = |t: &Tensor| t.narrow(0, first, vocab - first).unwrap();
    let found = (rows(&dw) / 0.75).unwrap();
    let expected = rows(&grad(&vw));
    assert!(difference(&found, &expected) < 1e-5, "dw {:e}", difference(&found, &expected));
    if case.bias {
        let found = (&db / 0.75).unwrap();
        assert!(difference(&found, &grad(&vb)) < 1e-5);
    } else {
        assert!(floats(&db).iter().all(|x| x.is_nan()));
    }

    let (direction, step) = (random(rng, &[n, width]), 1e-4);
    let moved = |by: f64| -> f64 {
        let h = (f64s(&h) + (f64s(&direction) * by).unwrap()).unwrap();
        objective(&h, &vw, &vb)[2].to_scalar().unwrap()
    };
    let slope = (moved(step) - moved(-step)) / (2.0 * step);
    let found: f64 =
        (f64s(&dh) * f64s(&direction)).unwrap().sum_all().unwrap().to_scalar().unwrap();
    assert!((slope - found).abs() < 1e-5 * (n * width) as f64, "slope {slope}, found {found}");
}

const CASE: Case =
    Case { n: 40, width: 24, vocab: 301, bias: false, softcap: None, teacher: None, ignored: 0 };

#[test]
fn more_rows_than_a_chunk() {
    assert!(chunk_rows(5000) < 430);
    check(1, &Case { n: 860, vocab: 5000, ignored: 9, ..CASE });
    check(2, &Case { n: 530, vocab: 77, ..CASE });
}

#[test]
fn bias_cap_and_teacher() {
    check(3, &Case { bias: true, softcap: Some(1.5), ignored: 3, ..CASE });
    check(4, &Case { teacher: Some((2.0, 0.7)), ..CASE });
    check(
        5,
        &Case { teacher: Some((0.5, 1.0)), bias: true, softcap: Some(4.0), ignored: 2, ..CASE },
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn odd_shapes(
        seed: u64,
        (n, width, vocab) in (1usize..40, 1usize..40, 1usize..90),
        bias: bool,
        softcap in prop::option::of(0.5f32..5.0),
        teacher in prop::option::of((0.5f32..4.0, 0.0f32..=1.0)),
        ignored in 0usize..4,
    ) {
        check(seed, &Case { n, width, vocab, bias, softcap, teacher, ignored });
    }
}

#[test]
fn all_targets_ignored_is_zero_everywhere() {
    let rng = &mut ChaCha8Rng::seed_from_u64(6);
    let (h, weight) = (random(rng, &[5, 3]), random(rng, &[7, 3]));
    let (dw, db) = (random(rng, &[7, 3]), random(rng, &[7]));
    let head = Head { weight: &weight, bias: None, softcap: None };
    let run = |accum| {
        let backward =
            Backward { scale: 1.0, dweight: Some((0..7, (&dw, accum))), dbias: Some((&db, accum)) };
        cross_entropy(&h, &head, &[IGNORE; 5], None, Some(&backward)).unwrap()
    };
    let (dw_before, db_before) = (floats(&dw), floats(&db));
    let out = run(Accum::Add);
    assert_eq!((out.sum, out.count, floats(&out.dh.unwrap())), (0.0, 0, vec![0.0; 15]));
    assert_eq!((floats(&dw), floats(&db)), (dw_before, db_before));
    run(Accum::Overwrite);
    assert_eq!((floats(&dw), floats(&db)), (vec![0.0; 21], vec![0.0; 7]));
    let empty = random(rng, &[0, 3]);
    assert_eq!(cross_entropy(&empty, &head, &[], None, None).unwrap().count, 0);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let rng = &mut ChaCha8Rng::seed_from_u64(7);
    let (h, weight, bias) =
        (random(rng, &[700, 48]), random(rng, &[2500, 48]), random(rng, &[2500]));
    let head = Head { weight: &weight, bias: Some(&bias), softcap: None };
    let targets: Vec<i64> = (0..700).map(|i| if i % 128 == 127 { IGNORE } else { i * 3 }).collect();
    let run = |threads| {
        let (dw, db) = (weight.copy().unwrap(), bias.copy().unwrap());
        let add = Accum::Overwrite;
        let backward =
            Backward { scale: 0.1, dweight: Some((0..2500, (&dw, add))), dbias: Some((&db, add)) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let out =
            pool.install(|| cross_entropy(&h, &head, &targets, None, Some(&backward))).unwrap();
        let bits = |t: &Tensor| floats(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (out.sum.to_bits(), bits(&out.dh.unwrap()), bits(&dw), bits(&db))
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn scores_agree_with_the_logits() {
    let rng = &mut ChaCha8Rng::seed_from_u64(8);
    let (h, weight, bias) = (random(rng, &[300, 9]), random(rng, &[40, 9]), random(rng, &[40]));
    for softcap in [None, Some(2.0)] {
        let head = Head { weight: &weight, bias: Some(&bias), softcap };
        let all = logits(&h, &head).unwrap();
        let plain = plain_logits(&f64s(&h), &f64s(&weight), Some(&f64s(&bias)), softcap);
        assert!(difference(&all, &plain) < 1e-6);
        let probabilities = log_softmax(&plain).to_vec2::<f64>().unwrap();
        let rows = all.to_vec2::<f32>().unwrap();
        let first_argmax = |row: &[f32]| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().position(|&x| x == max).unwrap() as u32
        };
        // Rows in any order, some often, some never.
        let wanted: Vec<(u32, u32)> = (0..900u32)
            .map(|i| (i * 7 % 300, i))
            .filter(|(row, _)| row % 5 != 0)
            .map(|(row, i)| match i % 3 {
                0 => (row, first_argmax(&rows[row as usize])),
                _ => (row, i % 40),
            })
            .collect();
        let scores = score_tokens(&h, &head, &wanted).unwrap();
        assert_eq!(scores.len(), wanted.len());
        for (score, &(row, token)) in scores.iter().zip(&wanted) {
            let expected = probabilities[row as usize][token as usize];
            assert!((f64::from(score.logprob) - expected).abs() < 3e-6);
            assert_eq!(score.greedy, token == first_argmax(&rows[row as usize]));
        }
        let greedy = greedy_tokens(&h, &head).unwrap();
        let expected: Vec<_> = rows.iter().map(|row| Some(first_argmax(row))).collect();
        assert_eq!(greedy, expected);
        assert!(score_tokens(&h, &head, &[]).unwrap().is_empty());
    }
}

/// A row's chunk and its neighbours in it change the blocks of the products, so rows are compared
/// bit for bit where the same rows are wanted.
#[test]
fn more_tokens_of_a_row_change_no_bit() {
    let rng = &mut ChaCha8Rng::seed_from_u64(12);
    let (h, weight) = (random(rng, &[60, 24]), random(rng, &[1000, 24]));
    let head = Head { weight: &weight, bias: None, softcap: None };
    let one: Vec<(u32, u32)> = (0..60).step_by(2).map(|row| (row, row * 3)).collect();
    let more: Vec<(u32, u32)> =
        one.iter().rev().flat_map(|&(row, token)| [(row, 999), (row, token), (row, 0)]).collect();
    let (alone, together) =
        (score_tokens(&h, &head, &one).unwrap(), score_tokens(&h, &head, &more).unwrap());
    for (alone, together) in alone.iter().rev().zip(together.iter().skip(1).step_by(3)) {
        assert_eq!(alone.logprob.to_bits(), together.logprob.to_bits());
        assert_eq!(alone.greedy, together.greedy);
    }
}

#[test]
fn of_equal_logits_the_first_is_greedy() {
    let h = Tensor::ones((3, 1), DType::F32, &Device::Cpu).unwrap();
    let weight = Tensor::new(&[[0f32], [2.], [1.], [2.]], &Device::Cpu).unwrap();
    let head = Head { weight: &weight, bias: None, softcap: None };
    let scores = score_tokens(&h, &head, &[(0, 1), (1, 3), (2, 0), (1, 1)]).unwrap();
    assert_eq!(scores.iter().map(|s| s.greedy).collect::<Vec<_>>(), [true, false, false, true]);
    assert_eq!(greedy_tokens(&h, &head).unwrap(), [Some(1); 3]);
    // The same in every lane and past the last whole chunk of them.
    for (first, rows) in [(0, 40), (15, 16), (17, 33), (39, 40)] {
        let weight: Vec<f32> = (0..rows).map(|i| if i < first { -1.0 } else { 2.0 }).collect();
        let weight = Tensor::from_vec(weight, (rows, 1), &Device::Cpu).unwrap();
        let head = Head { weight: &weight, bias: None, softcap: None };
        let expected = Some(first as u32).filter(|_| first < rows);
        assert_eq!(greedy_tokens(&h, &head).unwrap(), [expected; 3]);
    }
    let broken = (h * f64::NAN).unwrap();
    assert_eq!(greedy_tokens(&broken, &head).unwrap(), [None; 3]);
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let rng = &mut ChaCha8Rng::seed_from_u64(10);
    let (h, weight) = (random(rng, &[4, 3]), random(rng, &[6, 3]));
    let head = Head { weight: &weight, bias: None, softcap: None };
    let found = score_tokens(&h, &head, &[(0, 5), (4, 0)]);
    assert!(matches!(found, Err(Error::Range { what: "rows", len: 4, .. })), "{found:?}");
    let found = score_tokens(&h, &head, &[(0, 5), (3, 6)]);
    assert!(
        matches!(found, Err(Error::TokenOutOfRange { index: 1, id: 6, rows: 6, .. })),
        "{found:?}"
    );
}

#[test]
fn contradictions_are_errors() {
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    let (h, weight) = (random(rng, &[4, 3]), random(rng, &[6, 3]));
    let head = Head { weight: &weight, bias: None, softcap: None };
    let targets = [0, 5, IGNORE, 2];
    let run =
        |h: &Tensor, head: &Head<'_>, targets: &[i64]| cross_entropy(h, head, targets, None, None);
    assert!(run(&h, &head, &targets).is_ok());
    for bad in [6, -1, i64::MIN, i64::MAX] {
        let found = run(&h, &head, &[0, bad, IGNORE, 2]);
        assert!(
            matches!(found, Err(Error::TokenOutOfRange { index: 1, id, rows: 6, .. }) if id == bad)
        );
    }
    assert!(run(&h, &head, &[0, 1]).is_err());
    assert!(run(&weight, &Head { weight: &h.t().unwrap(), ..head }, &targets).is_err());
    assert!(run(&h, &Head { bias: Some(&h), ..head }, &targets).is_err());
    assert!(run(&h, &Head { softcap: Some(-1.0), ..head }, &targets).is_err());

    let backward = |dweight| {
        let backward = Backward { scale: 1.0, dweight, dbias: None };
        cross_entropy(&h, &head, &targets, None, Some(&backward)).map(|_| ())
    };
    assert!(matches!(backward(Some((0..6, (&weight, Accum::Add)))), Err(Error::Aliased { .. })));
    assert!(backward(Some((0..6, (&h, Accum::Add)))).is_err());
    let dw = weight.zeros_like().unwrap();
    assert!(backward(Some((0..7, (&dw, Accum::Add)))).is_err());
    assert!(backward(Some((0..6, (&dw, Accum::Add)))).is_ok());

    let taught = |hidden: &Tensor, weight: &Tensor, temperature, share| {
        let head = Head { weight, bias: None, softcap: None };
        let teacher = Teacher { hidden, head, temperature, weight: share };
        cross_entropy(&h, &Head { weight: &dw, ..head }, &targets, Some(&teacher), None).is_ok()
    };
    assert!(taught(&h, &weight, 1.0, 0.5));
    assert!(!taught(&h, &h, 1.0, 0.5));
    assert!(!taught(&weight, &weight, 1.0, 0.5));
    assert!(!taught(&h, &weight, 0.0, 0.5));
    assert!(!taught(&h, &weight, 1.0, 1.5));
}
