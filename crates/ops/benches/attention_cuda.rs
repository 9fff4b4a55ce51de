//! Attention on a GPU at the shapes of training runs, bf16: milliseconds forward and backward, and
//! what that is in TFLOP/s (4 and 10 operations a causal pair of query and key, column and head).
//!
//! `cargo bench --features relufy-ops/cuda --bench attention_cuda`
#![allow(missing_docs, reason = "a benchmark")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]
#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use relufy_ops::attention::{self, Heads, Qkv, Segment};
use relufy_ops::device;

/// Calls between two waits, and how often they are timed.
const BATCH: usize = 5;
const TIMES: usize = 20;

struct Shape {
    name: &'static str,
    heads: Heads,
    lengths: Vec<usize>,
}

fn shape(
    name: &'static str,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    lengths: Vec<usize>,
) -> Shape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let heads =
        Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None };
    Shape { name, heads, lengths }
}

/// The middle of some timings, in milliseconds a call.
fn median(gpu: &Device, call: impl Fn()) -> f64 {
    call();
    let mut times: Vec<f64> = (0..TIMES)
        .map(|_| {
            device::synchronize(gpu).unwrap();
            let start = Instant::now();
            (0..BATCH).for_each(|_| call());
            device::synchronize(gpu).unwrap();
            start.elapsed().as_secs_f64() * 1e3 / BATCH as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[TIMES / 2]
}

fn main() {
    let gpu = match device::open("cuda") {
        Ok(gpu) => gpu,
        Err(why) => return println!("no GPU: {why}"),
    };
    let mixed = vec![3000, 100, 700, 2048, 17, 900, 1500, 4000, 64, 1800, 1200, 1055];
    let mut shapes = vec![
        shape("8 x 2048, 16 x 128", (16, 16, 128), vec![2048; 8]),
        shape("4 x 2048, 32 (8) x 128", (32, 8, 128), vec![2048; 4]),
        shape("32 x 1024, 12 x 64", (12, 12, 64), vec![1024; 32]),
        shape("8 x 2048, 71 (1) x 64", (71, 1, 64), vec![2048; 8]),
        shape("16384 mixed, 16 x 128", (16, 16, 128), mixed),
        shape("8 x 2048, 32 x 80", (32, 32, 80), vec![2048; 8]),
        shape("8 x 2048, 16 x 96", (16, 16, 96), vec![2048; 8]),
        shape("4 x 2048, 8 (4) x 256", (8, 4, 256), vec![2048; 4]),
    ];
    let mut windowed = shape("4 x 4096, 32 (8) x 128, window 1024", (32, 8, 128), vec![4096; 4]);
    windowed.heads.window = Some(1024);
    shapes.push(windowed);
    let mut steep = shape("8 x 2048, 16 x 64, ALiBi", (16, 16, 64), vec![2048; 8]);
    steep.heads.alibi = Some(vec![0.1; 16].into());
    shapes.push(steep);
    println!(
        "{:38} {:>10} {:>8} {:>11} {:>8}",
        "shape", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s"
    );
    for Shape { name, heads, lengths } in shapes {
        let n: usize = lengths.iter().sum();
        let mut start = 0;
        let segments: Vec<_> = lengths
            .iter()
            .map(|&len| {
                start += len;
                Segment::document(start - len, len)
            })
            .collect();
        let random = |width: usize| {
            Tensor::randn(0f32, 1.0, (n, width), &gpu).unwrap().to_dtype(DType::BF16).unwrap()
        };
        let x = random((heads.heads + 2 * heads.kv_heads) * heads.head_dim);
        let dout = random(heads.heads * heads.head_dim);
        let qkv = Qkv::packed(&x, &heads);
        let saved = attention::forward(&qkv, &segments, &heads).unwrap();
        let forward = median(&gpu, || {
            attention::forward(&qkv, &segments, &heads).unwrap();
        });
        let backward = median(&gpu, || {
            attention::backward(&qkv, &segments, &heads, &saved, &dout).unwrap();
        });
        let window = heads.window.unwrap_or(usize::MAX);
        let pairs: usize =
            lengths.iter().map(|&len| (1..=len).map(|seen| seen.min(window)).sum::<usize>()).sum();
        let work = (pairs * heads.heads * heads.head_dim) as f64 / 1e9;
        println!(
            "{name:38} {forward:10.3} {:8.0} {backward:11.3} {:8.0}",
            4.0 * work / forward,
            10.0 * work / backward
        );
    }
}
