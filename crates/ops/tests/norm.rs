//! LayerNorm and RMSNorm, over rows and over heads.
#![allow(clippy::unwrap_used, reason = "a failure is the test's failure")]

mod oracle;

use candle_core::{D, DType, Result, Tensor};
use oracle::{Found, Random, assert_close, bits, check, poison, same_for_any_threads};
use proptest::prelude::*;
use relufy_ops::norm::{self, Norm, NormKind};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::{Accum, Error};

const KINDS: [NormKind; 3] =
    [NormKind::Layer, NormKind::Rms { unit_offset: false }, NormKind::Rms { unit_offset: true }];
const EPS: f32 = 1e-3;

/// The norm of the last dimension, in plain steps.
fn formula(
    kind: NormKind,
    post: Pointwise,
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
) -> Result<Tensor> {
    let x = match kind {
        NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        NormKind::Rms { .. } => x.clone(),
    };
    let spread = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(EPS))?.sqrt()?;
    let gain = if kind == (NormKind::Rms { unit_offset: true }) { (w + 1.0)? } else { w.clone() };
    let y = x.broadcast_div(&spread)?.broadcast_mul(&gain)?;
    let y = match b {
        Some(b) => y.broadcast_add(b)?,
        None => y,
    };
    if post == Pointwise::Relu { &y * y.detach().gt(0.0)?.to_dtype(DType::F64)? } else { Ok(y) }
}

fn one_case(n: usize, width: usize, kind: NormKind, with_bias: bool, post: Pointwise, seed: u64) {
    let mut random = Random::new(seed);
    let (x, w, b) = (random.tensor((n, width)), random.tensor(width), random.tensor(width));
    let dy = random.tensor((n, width));
    let norm = Norm { kind, eps: EPS, weight: &w, bias: with_bias.then_some(&b), post };
    let (y, stats) = norm::forward(&x, &norm).unwrap();
    let (dx, dw, db) = (poison((n, width)), poison(width), poison(width));
    let dbias = with_bias.then_some((&db, Accum::Overwrite));
    norm::backward(
        &x,
        &norm,
        &stats,
        &dy,
        (&dx, Accum::Overwrite),
        Some((&dw, Accum::Overwrite)),
        dbias,
    )
    .unwrap();
    let residual = random.tensor((n, width));
    let sum = (&residual + &dx).unwrap();
    norm::backward(&x, &norm, &stats, &dy, (&residual, Accum::Add), None, None).unwrap();
    assert_close("added to the residual", &residual, &sum, 1e-6);
    let gradients = vec![Some(dx), Some(dw), with_bias.then_some(db)];
    check(&[&x, &w, &b], &dy, &Found { y, gradients }, |t| {
        formula(kind, post, &t[0], &t[1], with_bias.then_some(&t[2]))
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn agrees_with_the_oracle(n in 0usize..6, width in 4usize..80, bias: bool, seed: u64) {
        for kind in KINDS {
            for post in [Pointwise::Identity, Pointwise::Relu] {
                one_case(n, width, kind, bias, post, seed);
            }
        }
    }

    #[test]
    fn heads_agree_with_the_oracle(n in 0usize..5, dim in 4usize..20, heads in 1usize..4, seed: u64) {
        for kind in KINDS {
            let mut random = Random::new(seed);
            let (from, block) = (3, heads * dim);
            let width = block + 5;
            let (x, w, dy) = (random.tensor((n, width)), random.tensor(dim), random.tensor((n, width)));
            let post = Pointwise::Identity;
            let norm = Norm { kind, eps: EPS, weight: &w, bias: None, post };
            let (y, dx, dw) = (x.copy().unwrap(), dy.copy().unwrap(), poison(dim));
            let stats = norm::forward_heads(&y, from..from + block, dim, &norm).unwrap();
            let dest = Some((&dw, Accum::Overwrite));
            norm::backward_heads(&dx, from..from + block, dim, &norm, &stats, dest).unwrap();
            check(&[&x, &w], &dy, &Found { y, gradients: vec![Some(dx), Some(dw)] }, |t| {
                let heads = t[0].narrow(1, from, block)?.contiguous()?.reshape((n, heads, dim))?;
                let heads = formula(kind, post, &heads, &t[1], None)?.reshape((n, block))?;
                Tensor::cat(&[&t[0].narrow(1, 0, from)?, &heads, &t[0].narrow(1, from + block, 2)?], 1)
            });
        }
    }
}

#[test]
fn agrees_where_threads_share_the_work() {
    one_case(260, 257, NormKind::Layer, true, Pointwise::Relu, 1);
    one_case(300, 192, NormKind::Rms { unit_offset: false }, false, Pointwise::Identity, 2);
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut random = Random::new(3);
    let (x, w, b) = (random.tensor((700, 96)), random.tensor(96), random.tensor(96));
    let (dy, head_w) = (random.tensor((700, 96)), random.tensor(16));
    same_for_any_threads(|| {
        let norm = Norm {
            kind: NormKind::Layer,
            eps: EPS,
            weight: &w,
            bias: Some(&b),
            post: Pointwise::Relu,
        };
        let (y, stats) = norm::forward(&x, &norm).unwrap();
        let (dx, dw, db) = (poison((700, 96)), poison(96), poison(96));
        let to = |t| (t, Accum::Overwrite);
        norm::backward(&x, &norm, &stats, &dy, to(&dx), Some(to(&dw)), Some(to(&db))).unwrap();
        let (heads, dheads, dhead_w) = (x.copy().unwrap(), dy.copy().unwrap(), poison(16));
        let norm = Norm { weight: &head_w, bias: None, ..norm };
        let stats = norm::forward_heads(&heads, 16..80, 16, &norm).unwrap();
        norm::backward_heads(&dheads, 16..80, 16, &norm, &stats, Some(to(&dhead_w))).unwrap();
        vec![y, dx, dw, db, heads, dheads, dhead_w]
    });
}

#[test]
fn says_what_does_not_fit() {
    let mut random = Random::new(4);
    let (x, w) = (random.tensor((2, 6)), random.tensor(5));
    let norm =
        Norm { kind: NormKind::Layer, eps: EPS, weight: &w, bias: None, post: Pointwise::Identity };
    assert!(matches!(norm::forward(&x, &norm), Err(Error::Shape { .. })));
    assert!(matches!(norm::forward_heads(&x, 0..6, 5, &norm), Err(Error::Indivisible { .. })));
    assert!(matches!(norm::forward_heads(&x, 4..9, 5, &norm), Err(Error::Range { .. })));
    let w = random.tensor(6);
    let norm = Norm { weight: &w, ..norm };
    let (_, stats) = norm::forward(&x.narrow(0, 0, 1).unwrap(), &norm).unwrap();
    let dx = x.copy().unwrap();
    let backward = norm::backward(&x, &norm, &stats, &x, (&dx, Accum::Add), None, None);
    assert!(matches!(backward, Err(Error::Shape { tensor: "stats", .. })));
}

#[test]
fn computes_the_output_again() {
    let mut random = Random::new(5);
    let (x, w, b) = (random.tensor((37, 50)), random.tensor(50), random.tensor(50));
    for kind in KINDS {
        let (bias, post) = (Some(&b), Pointwise::Relu);
        let norm = Norm { kind, eps: EPS, weight: &w, bias, post };
        let (y, stats) = norm::forward(&x, &norm).unwrap();
        assert_eq!(bits(&norm::again(&x, &norm, &stats).unwrap()), bits(&y));
        let fewer = norm::again(&x.narrow(0, 0, 36).unwrap(), &norm, &stats);
        assert!(matches!(fewer, Err(Error::Shape { tensor: "stats", .. })));
    }
}
