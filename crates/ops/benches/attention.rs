//! Attention, loss and optimizer at the shapes of two small training runs, and one decoding step.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use relufy_ops::Accum;
use relufy_ops::adamw::{self, AdamW};
use relufy_ops::attention::{self, Cols, Heads, Qkv, Run, Segment};
use relufy_ops::loss::{self, Backward, Head};

fn random(shape: &[usize]) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu).unwrap()
}

fn heads(heads: usize, kv_heads: usize) -> Heads {
    Heads { heads, kv_heads, head_dim: 64, scale: 0.125, window: None, softcap: None, alibi: None }
}

fn bench_attention(c: &mut Criterion) {
    for (batch, time, heads) in
        [(4, 128, heads(4, 4)), (8, 256, heads(8, 8)), (1, 2048, heads(8, 2))]
    {
        let n = batch * time;
        let x = random(&[n, (heads.heads + 2 * heads.kv_heads) * heads.head_dim]);
        let dout = random(&[n, heads.heads * heads.head_dim]);
        let segments: Vec<_> = (0..batch).map(|b| Segment::document(b * time, time)).collect();
        let qkv = Qkv::packed(&x, &heads);
        let saved = attention::forward(&qkv, &segments, &heads).unwrap();
        let shape = format!("{batch}x{time}, {} of {} heads", heads.kv_heads, heads.heads);
        c.bench_function(&format!("attention forward {shape}"), |b| {
            b.iter(|| attention::forward(black_box(&qkv), &segments, &heads).unwrap());
        });
        c.bench_function(&format!("attention backward {shape}"), |b| {
            b.iter(|| {
                attention::backward(black_box(&qkv), &segments, &heads, &saved, &dout).unwrap()
            });
        });
    }
    let (q, kv) = (random(&[1, 32 * 64]), random(&[4096, 8 * 64]));
    let cols = |tensor| Cols { tensor, start_col: 0 };
    let qkv = Qkv { q: cols(&q), k: cols(&kv), v: cols(&kv) };
    let segments = [Segment::continued((0, 1), (0, 4096))];
    c.bench_function("attention of one token over 4096 keys, 8 of 32 heads", |b| {
        b.iter(|| attention::forward(black_box(&qkv), &segments, &heads(32, 8)).unwrap());
    });
    // Questions behind a head that they share: many long branches, many short ones.
    for (branches, len) in [(40, 80), (160, 20), (640, 5)] {
        let prefix = 700;
        let x = random(&[prefix + branches * len, 3 * 8 * 64]);
        let segments: Vec<_> = (0..branches)
            .map(|b| {
                Segment::document(prefix + b * len, len).after([Run { start: 0, len: prefix }])
            })
            .collect();
        let name = format!("attention of {branches} branches of {len} over {prefix}, 8 heads");
        let (heads, qkv) = (heads(8, 8), Qkv::packed(&x, &heads(8, 8)));
        c.bench_function(&name, |b| {
            b.iter(|| attention::forward(black_box(&qkv), &segments, &heads).unwrap());
        });
    }
}

fn bench_loss(c: &mut Criterion) {
    for (n, width) in [(512, 256), (2048, 512)] {
        let vocab = 4096;
        let (h, weight) = (random(&[n, width]), random(&[vocab, width]));
        let dweight = weight.zeros_like().unwrap();
        let targets: Vec<i64> =
            (0..n as i64).map(|i| if i % 128 == 127 { -100 } else { i }).collect();
        let head = Head { weight: &weight, bias: None, softcap: None };
        let into = Some((0..vocab, (&dweight, Accum::Overwrite)));
        let backward = Backward { scale: 1.0, dweight: into, dbias: None };
        c.bench_function(&format!("loss {n}x{width}x{vocab}"), |b| {
            b.iter(|| {
                loss::cross_entropy(black_box(&h), &head, &targets, None, Some(&backward)).unwrap()
            });
        });
    }
}

fn bench_adamw(c: &mut Criterion) {
    let [p, g, m, v] = [(); 4].map(|()| random(&[5300, 1000]).abs().unwrap());
    let hp = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    c.bench_function("adamw 5.3M", |b| {
        b.iter(|| adamw::step(black_box(&p), &g, &m, &v, &hp, 10, 1.0, None).unwrap());
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(2));
    targets = bench_attention, bench_loss, bench_adamw
}
criterion_main!(benches);
