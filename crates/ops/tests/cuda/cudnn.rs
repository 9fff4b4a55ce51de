//! Attention through cuDNN against the CPU; no tests where `RELUFY_ATTENTION=own` does without it.

use std::sync::{Mutex, PoisonError};

use candle_core::DType;
use relufy_ops::attention::{self, Heads, Qkv, Saved, Segment};
use relufy_ops::device;

use crate::common::{Random, Trials, assert_close, assert_same, gpu, on_gpu};

pub fn trials() -> Trials {
    if std::env::var("RELUFY_ATTENTION").is_ok_and(|choice| choice == "own") {
        return Trials::new();
    }
    vec![
        ("cudnn::one_key_head_each", || agrees(2, 128, heads(4, 4, 64))),
        ("cudnn::grouped_odd_length", || agrees(9, 457, heads(8, 2, 128))),
        ("cudnn::many_heads_on_one", || agrees(1, 192, heads(71, 1, 64))),
        ("cudnn::heads_of_80_odd_length", || agrees(8, 515, heads(4, 4, 80))),
        ("cudnn::heads_of_96", || agrees(3, 320, heads(6, 3, 96))),
        ("cudnn::window_without_effect", || {
            agrees(2, 256, Heads { window: Some(256), ..heads(4, 2, 128) });
        }),
        ("cudnn::not_deterministic", not_deterministic),
        ("cudnn::repeats", repeats),
        ("cudnn::wide_heads_forward", wide_heads_forward),
    ]
}

/// The setting is the process's, so these tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None }
}

fn documents(batch: usize, len: usize) -> Vec<Segment> {
    (0..batch).map(|at| Segment::document(at * len, len)).collect()
}

/// How often cuDNN ran.
fn runs() -> u64 {
    device::cudnn().unwrap().unwrap().runs
}

#[track_caller]
fn ran_since(before: u64) {
    let cudnn = device::cudnn().unwrap().unwrap();
    assert!(cudnn.runs > before, "cuDNN was not used: {:?}", cudnn.refused);
}

fn agrees(batch: usize, len: usize, heads: Heads) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    check(batch, len, &heads);
}

fn not_deterministic() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let result = std::panic::catch_unwind(|| {
        device::set_deterministic(false);
        check(4, 384, &heads(8, 4, 128));
    });
    device::set_deterministic(true);
    result.unwrap();
}

fn check(batch: usize, len: usize, heads: &Heads) {
    let before = runs();
    let segments = documents(batch, len);
    let mut random = Random::new(len as u64);
    let (rows, out_width) = (batch * len, heads.heads * heads.head_dim);
    let x = random.tensor((rows, out_width + 2 * heads.kv_heads * heads.head_dim));
    let dout = random.tensor((rows, out_width));
    let expected = attention::forward(&Qkv::packed(&x, heads), &segments, heads).unwrap();
    let expected_grad =
        attention::backward(&Qkv::packed(&x, heads), &segments, heads, &expected, &dout).unwrap();

    let x = on_gpu(&x, DType::BF16);
    let qkv = Qkv::packed(&x, heads);
    let found = attention::forward(&qkv, &segments, heads).unwrap();
    ran_since(before);
    assert_eq!((found.out.dtype(), found.lse.dtype()), (DType::BF16, DType::F32));
    assert_close("out", &found.out, &expected.out, 1e-2);
    assert_close("lse", &found.lse, &expected.lse, 1e-3);

    // From the CPU's own numbers, so that an error of forward stays where it is; then from those
    // of this forward.
    let given = Saved {
        out: on_gpu(&expected.out, DType::BF16),
        lse: expected.lse.to_device(gpu()).unwrap(),
    };
    let dout = on_gpu(&dout, DType::BF16);
    let before = runs();
    for saved in [&given, &found] {
        let grad = attention::backward(&qkv, &segments, heads, saved, &dout).unwrap();
        ran_since(before);
        let (q, kv) = (out_width, heads.kv_heads * heads.head_dim);
        for (name, start, width) in [("dq", 0, q), ("dk", q, kv), ("dv", q + kv, kv)] {
            let part = |t: &candle_core::Tensor| t.narrow(1, start, width).unwrap();
            assert_close(name, &part(&grad), &part(&expected_grad), 1e-2);
        }
    }
}

fn repeats() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let before = runs();
    assert!(device::deterministic());
    let heads = heads(16, 4, 128);
    let segments = documents(4, 1024);
    let mut random = Random::new(7);
    let x = on_gpu(&random.tensor((4096, 24 * 128)), DType::BF16);
    let dout = on_gpu(&random.tensor((4096, 16 * 128)), DType::BF16);
    let both = || {
        let qkv = Qkv::packed(&x, &heads);
        let saved = attention::forward(&qkv, &segments, &heads).unwrap();
        let grad = attention::backward(&qkv, &segments, &heads, &saved, &dout).unwrap();
        (saved, grad)
    };
    let (one, one_grad) = both();
    ran_since(before);
    for _ in 0..3 {
        let (other, other_grad) = both();
        assert_same("out", &one.out, &other.out);
        assert_same("lse", &one.lse, &other.lse);
        assert_same("gradient", &one_grad, &other_grad);
    }
}

fn wide_heads_forward() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let before = runs();
    let heads = heads(4, 2, 256);
    let segments = documents(2, 128);
    let x = Random::new(3).tensor((256, 8 * 256));
    let expected = attention::forward(&Qkv::packed(&x, &heads), &segments, &heads).unwrap();
    let x = on_gpu(&x, DType::BF16);
    let found = attention::forward(&Qkv::packed(&x, &heads), &segments, &heads).unwrap();
    ran_since(before);
    assert_close("out", &found.out, &expected.out, 1e-2);
    assert_close("lse", &found.lse, &expected.lse, 1e-3);
}
