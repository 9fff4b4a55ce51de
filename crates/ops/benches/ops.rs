//! The hot operations at the shapes of a small Llama: 512 tokens, hidden 256, ffn 704.
//!
//! `cargo bench -p relufy-ops -- --quick`. Products report multiply-adds, the others elements.
#![allow(clippy::unwrap_used, missing_docs, reason = "a failure is the benchmark's failure")]

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use relufy_ops::norm::{self, Norm, NormKind};
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::rope::{self, RopePairs, RopeTable};
use relufy_ops::{Accum, embedding, gated, linear, reduce};

const TOKENS: usize = 512;
const HIDDEN: usize = 256;
const FFN: usize = 704;
const VOCAB: usize = 4096;

fn random(rows: usize, cols: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu).unwrap()
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    for (n, inputs, outputs) in [
        (TOKENS, HIDDEN, 3 * HIDDEN),
        (TOKENS, HIDDEN, 2 * FFN),
        (TOKENS, FFN, HIDDEN),
        (2048, 512, 2816),
        (1, HIDDEN, 2 * FFN),
        (1, 2048, 8192),
    ] {
        let (x, w, dy) = (random(n, inputs), random(outputs, inputs), random(n, outputs));
        let (dx, dw) = (random(n, inputs), random(outputs, inputs));
        let name = |what| format!("{what} {n}x{inputs}x{outputs}");
        group.throughput(Throughput::Elements((n * inputs * outputs) as u64));
        group.bench_function(name("forward"), |b| {
            b.iter(|| linear::forward(black_box(&x), &w, None).unwrap());
        });
        group.bench_function(name("backward_input"), |b| {
            b.iter(|| linear::backward_input(black_box(&dy), &w, Some((&dx, Accum::Add))).unwrap());
        });
        group.bench_function(name("backward_weight"), |b| {
            let to = (&dw, Accum::Overwrite);
            b.iter(|| linear::backward_weight(black_box(&dy), &x, 0..outputs, to).unwrap());
        });
    }
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    let (gu, dh) = (random(TOKENS, 2 * FFN), random(TOKENS, FFN));
    group.throughput(Throughput::Elements((TOKENS * FFN) as u64));
    for f in [Pointwise::Silu, Pointwise::Gelu, Pointwise::Relu] {
        group.bench_function(format!("gated forward {f:?}"), |b| {
            b.iter(|| gated::forward(black_box(&gu), f).unwrap());
        });
        group.bench_function(format!("gated backward {f:?}"), |b| {
            b.iter(|| gated::backward(black_box(&gu), f, &dh).unwrap());
        });
        group.bench_function(format!("pointwise forward {f:?}"), |b| {
            b.iter(|| pointwise::forward(black_box(&dh), f).unwrap());
        });
    }
    group.finish();
}

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("rows");
    group.throughput(Throughput::Elements((TOKENS * HIDDEN) as u64));
    let (x, dy, dx) = (random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(TOKENS, HIDDEN));
    let w = Tensor::ones(HIDDEN, DType::F32, &Device::Cpu).unwrap();
    let dw = w.copy().unwrap();
    let kind = NormKind::Rms { unit_offset: false };
    let norm = Norm { kind, eps: 1e-5, weight: &w, bias: None, post: Pointwise::Relu };
    group.bench_function("rms norm forward", |b| {
        b.iter(|| norm::forward(black_box(&x), &norm).unwrap());
    });
    let (_, stats) = norm::forward(&x, &norm).unwrap();
    group.bench_function("rms norm backward", |b| {
        let (dx, dw) = ((&dx, Accum::Add), Some((&dw, Accum::Overwrite)));
        b.iter(|| norm::backward(black_box(&x), &norm, &stats, &dy, dx, dw, None).unwrap());
    });
    group.bench_function("non-zeros of each row", |b| {
        b.iter(|| reduce::count_nonzero_rows(black_box(&x)).unwrap());
    });
    let frequencies: Vec<f64> = (0..32).map(|i| 10_000f64.powf(-f64::from(i) / 32.0)).collect();
    let table = RopeTable::new(&frequencies, 128, 1.0);
    let positions: Vec<u32> = (0..TOKENS as u32).map(|i| i % 128).collect();
    group.bench_function("rope", |b| {
        b.iter(|| {
            rope::apply(&x, 0..HIDDEN, 64, &table, RopePairs::Half, &positions, false).unwrap();
        });
    });
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * 2_654_435 % VOCAB as u32).collect();
    let (vocabulary, dtable) = (random(VOCAB, HIDDEN), random(VOCAB, HIDDEN));
    group.bench_function("embedding forward", |b| {
        b.iter(|| embedding::forward(black_box(&vocabulary), &ids, None).unwrap());
    });
    group.bench_function("embedding backward", |b| {
        b.iter(|| embedding::backward(&ids, black_box(&x), None, (&dtable, Accum::Add)).unwrap());
    });
    group.finish();
}

criterion_group!(benches, products, elementwise, rows);
criterion_main!(benches);
