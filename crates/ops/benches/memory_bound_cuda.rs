//! What memory limits on a GPU, at the shapes of a 0.95 B and a 0.13 B model's step: microseconds a
//! call and the bytes that it must read and write, in TB/s. Beside them, each kernel's share.
//!
//! `cargo bench --features relufy-ops/cuda --bench memory_bound_cuda -- [part of an operation's name]`
#![allow(missing_docs, reason = "a benchmark")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]
#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use relufy_ops::adamw::{self, AdamW, Item};
use relufy_ops::loss::{self, Backward, Head};
use relufy_ops::norm::{self, Norm, NormKind};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::{self, RopePairs, RopeTable};
use relufy_ops::{Accum, Error, device, gated, reduce};

/// Calls between two waits, and how often they are timed.
const BATCH: usize = 12;
const TIMES: usize = 15;
/// Tensors take turns, so that the cache (50 MiB) has none of them from the last call.
const TURNS: usize = 4;

struct Bench {
    gpu: Device,
    /// Its square keeps the GPU busy until the host has queued a batch.
    head_start: Tensor,
    /// Operations with this in their names run.
    only: String,
}

impl Bench {
    fn random(&self, rows: usize, width: usize) -> Tensor {
        let x = Tensor::randn(0f32, 1.0, (rows, width), &self.gpu).unwrap();
        x.to_dtype(DType::BF16).unwrap()
    }

    fn zeros(&self, len: usize, dtype: DType) -> Tensor {
        Tensor::zeros(len, dtype, &self.gpu).unwrap()
    }

    /// Whether an operation, or one of a kind, is asked for.
    fn wants(&self, op: &str) -> bool {
        op.contains(&self.only) || self.only.contains(op)
    }

    /// Times the kernels of `module` that `call` queues; it gets the number of the turn, and a call
    /// has to move `bytes`.
    fn time(&self, op: &str, shape: &str, module: &str, bytes: usize, call: impl Fn(usize)) {
        if !op.contains(&self.only) {
            return;
        }
        (0..TURNS).for_each(&call);
        let mut totals = Vec::new();
        let mut kernels: HashMap<String, Vec<f64>> = HashMap::new();
        for _ in 0..TIMES {
            let ((), spans) = device::profile(&self.gpu, || {
                self.head_start.sqr()?;
                (0..BATCH).for_each(|i| call(i % TURNS));
                Ok::<_, Error>(())
            })
            .unwrap();
            let mut total = 0.0;
            for span in spans {
                let Some(name) = span.label.strip_prefix(module) else { continue };
                let us = span.ms * 1e3 / BATCH as f64;
                kernels
                    .entry(name.trim_start_matches(['_', ':', ' ']).into())
                    .or_default()
                    .push(us);
                total += us;
            }
            totals.push(total);
        }
        let us = median(&mut totals);
        let mut kernels: Vec<(String, f64)> =
            kernels.into_iter().map(|(name, mut times)| (name, median(&mut times))).collect();
        kernels.sort_by(|a, b| b.1.total_cmp(&a.1));
        let kernels: Vec<_> = kernels.iter().map(|(name, us)| format!("{name} {us:.1}")).collect();
        let rate = bytes as f64 / us / 1e6;
        println!("{op:24} {shape:24} {us:8.1} {rate:6.2}  {}", kernels.join(", "));
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Several of something, for calls that take turns.
fn turns<T>(make: impl Fn() -> T) -> Vec<T> {
    (0..TURNS).map(|_| make()).collect()
}

fn copies(bench: &Bench) {
    let (rows, width) = (16384, 2048);
    let x = turns(|| bench.random(rows, width));
    // What a kernel that computes next to nothing reaches.
    bench.time("scale", "16384 x 2048", "reduce", 4 * rows * width, |i| {
        reduce::scale_in_place(&x[i], 1.0).unwrap();
    });
}

fn norms(bench: &Bench) {
    if !bench.wants("norm") {
        return;
    }
    for (rows, width) in [(16384, 2048), (32768, 768), (8192, 4096)] {
        let shape = format!("{rows} x {width}");
        let x = turns(|| bench.random(rows, width));
        let dy = turns(|| bench.random(rows, width));
        let dx = turns(|| bench.random(rows, width));
        let (weight, bias) = (bench.zeros(width, DType::BF16), bench.zeros(width, DType::BF16));
        let (dweight, dbias) = (weight.copy().unwrap(), bias.copy().unwrap());
        let elements = rows * width;
        let rms = Norm {
            kind: NormKind::Rms { unit_offset: false },
            eps: 1e-5,
            weight: &weight,
            bias: None,
            post: Pointwise::Identity,
        };
        let layer = Norm { kind: NormKind::Layer, bias: Some(&bias), ..rms };
        let relu = Norm { post: Pointwise::Relu, ..rms };
        for (name, norm) in [("RMSNorm", rms), ("RMSNorm+ReLU", relu), ("LayerNorm", layer)] {
            bench.time(&format!("norm fwd {name}"), &shape, "norm", 4 * elements, |i| {
                norm::forward(&x[i], &norm).unwrap();
            });
            let stats: Vec<_> = x.iter().map(|x| norm::forward(x, &norm).unwrap().1).collect();
            for (accum, bytes) in [(Accum::Add, 8), (Accum::Overwrite, 6)] {
                let op = format!("norm bwd {name} {accum:?}");
                bench.time(&op, &shape, "norm", bytes * elements, |i| {
                    let dw = Some((&dweight, Accum::Overwrite));
                    let db = norm.bias.map(|_| (&dbias, Accum::Overwrite));
                    norm::backward(&x[i], &norm, &stats[i], &dy[i], (&dx[i], accum), dw, db)
                        .unwrap();
                });
            }
        }
    }
}

fn ropes(bench: &Bench) {
    for (documents, tokens, heads, head_dim) in [(8, 2048, 16, 128), (32, 1024, 12, 64)] {
        let (rows, width) = (documents * tokens, 3 * heads * head_dim);
        let turned = 2 * heads * head_dim;
        let inv_freq: Vec<f64> =
            (0..head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let table = RopeTable::new(&inv_freq, tokens, 1.0);
        let positions: Vec<u32> = (0..rows).map(|i| (i % tokens) as u32).collect();
        let x = turns(|| bench.random(rows, width));
        let shape = format!("{rows}, 2 x {heads} x {head_dim}");
        for pairs in [RopePairs::Half, RopePairs::Interleaved] {
            let op = format!("rope {pairs:?}");
            bench.time(&op, &shape, "rope", 4 * rows * turned, |i| {
                rope::apply(&x[i], 0..turned, head_dim, &table, pairs, &positions, false).unwrap();
            });
        }
    }
}

fn gates(bench: &Bench) {
    for (rows, ffn) in [(16384, 5632), (32768, 2048)] {
        let shape = format!("{rows} x {ffn}");
        let gu = turns(|| bench.random(rows, 2 * ffn));
        let dh = turns(|| bench.random(rows, ffn));
        bench.time("gated fwd SiLU", &shape, "gated", 6 * rows * ffn, |i| {
            gated::forward(&gu[i], Pointwise::Silu).unwrap();
        });
        bench.time("gated bwd SiLU", &shape, "gated", 10 * rows * ffn, |i| {
            gated::backward(&gu[i], Pointwise::Silu, &dh[i]).unwrap();
        });
    }
}

fn losses(bench: &Bench) {
    if !bench.wants("cross-entropy") {
        return;
    }
    for (rows, vocab) in [(16384, 32_000), (2048, 128_256), (1024, 256_000)] {
        // The products with so narrow a head are not in the time.
        let width = 64;
        let h = bench.random(rows, width);
        let weight = bench.random(vocab, width);
        let head = Head { weight: &weight, bias: None, softcap: None };
        let targets: Vec<i64> = (0..rows).map(|i| (i * 7919 % vocab) as i64).collect();
        let backward = Backward { scale: 1.0 / rows as f32, dweight: None, dbias: None };
        // The logits are read, and their gradient written over them.
        let (op, shape) = ("cross-entropy", format!("{rows} x {vocab}"));
        bench.time(op, &shape, "loss", 4 * rows * vocab, |_| {
            loss::cross_entropy(&h, &head, &targets, None, Some(&backward)).unwrap();
        });
    }
}

/// Four layers of the 0.95 B model.
fn optimizer(bench: &Bench) {
    if !bench.wants("AdamW") && !bench.wants("gradient norm") {
        return;
    }
    const W: usize = 2048;
    let sizes = [W, W * 3 * W, W * W, W, W * 2 * 5632, 5632 * W].repeat(4);
    let count: usize = sizes.iter().sum();
    let shape = format!("{:.0} M in {}", count as f64 / 1e6, sizes.len());
    let of = |dtype| sizes.iter().map(|&n| bench.zeros(n, dtype)).collect::<Vec<_>>();
    let (params, grads, master) = (of(DType::BF16), of(DType::BF16), of(DType::F32));
    bench.time("gradient norm", &shape, "reduce", 2 * count, |_| {
        reduce::sum_of_squares_of(&grads.iter().collect::<Vec<_>>()).unwrap();
    });
    let hp = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    // The weight is only written.
    for (moment, bytes) in [(DType::F32, 28), (DType::BF16, 20)] {
        let (m, v) = (of(moment), of(moment));
        let items: Vec<Item<'_>> = (0..sizes.len())
            .map(|i| Item {
                param: &params[i],
                master: Some(&master[i]),
                grad: &grads[i],
                m: &m[i],
                v: &v[i],
                weight_decay: hp.weight_decay,
                rows: None,
            })
            .collect();
        bench.time(&format!("AdamW {moment:?} moments"), &shape, "adamw", bytes * count, |_| {
            adamw::step_all(&items, &hp, 3, 1.0).unwrap();
        });
    }
}

fn main() {
    let gpu = match device::open("cuda") {
        Ok(gpu) => gpu,
        Err(why) => return println!("no GPU: {why}"),
    };
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let head_start = Tensor::zeros(256 << 20, DType::F32, &gpu).unwrap();
    let bench = Bench { gpu, head_start, only };
    println!("{:24} {:24} {:>8} {:>6}  kernels, us", "operation", "shape", "us", "TB/s");
    for operation in [copies, norms, ropes, gates, losses, optimizer] {
        operation(&bench);
    }
}
