//! The kernels of decoding on a GPU at the shapes of a 7 B Llama: microseconds, and the rate at
//! which the weights that are needed were read, beside a plain read of 8 GB.
//!
//! `cargo bench --features relufy-ops/cuda --bench decode_cuda [-- WORD...]`: only lines that hold
//! a word; `tiles` also compares how matrices are shared out, `alone` lets no kernel start early.
#![allow(missing_docs, reason = "a benchmark")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]
#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use relufy_ops::attention::Heads;
use relufy_ops::decode::{
    Attention, AttentionPlan, Format, GpuMatrix, Graph, Input, KvCache, Norm, Output, PairsByInput,
    Room, Tiles, UpRows, Words, attend, gate_and_up, pairs_by_input, project_by_input,
    project_by_input_in, project_by_output, read_bandwidth, set_overlap, up_rows,
};
use relufy_ops::device;
use relufy_ops::pointwise::Pointwise;

const HIDDEN: usize = 4096;
const FFN: usize = 11008;
const QKV: usize = 12288;
const VOCAB: usize = 32000;

/// Weights of one measurement: far more than a cache holds.
const BYTES: usize = 800 << 20;
const TIMES: usize = 12;

struct Bench {
    gpu: Device,
    room: Room,
    /// Bytes a second of a plain read.
    read: f64,
    words: Vec<String>,
}

impl Bench {
    /// Whether a line is wanted.
    fn wants(&self, name: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word.as_str()))
    }

    fn zeros(&self, batch: usize, width: usize) -> Tensor {
        Tensor::zeros((batch, width), DType::F32, &self.gpu).unwrap()
    }

    fn random(&self, batch: usize, width: usize) -> Tensor {
        Tensor::randn(0f32, 1.0, (batch, width), &self.gpu).unwrap()
    }

    /// Ones at an exact number of places, spread at random.
    fn mask(&self, width: usize, density: f64) -> (Tensor, usize) {
        let ones = (width as f64 * density).round() as usize;
        let mut mask = vec![0f32; width];
        mask[..ones].fill(1.0);
        let mut state = 1u64;
        for i in (1..width).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            mask.swap(i, (state >> 33) as usize % (i + 1));
        }
        (Tensor::from_vec(mask, width, &self.gpu).unwrap(), ones)
    }

    /// Matrices that together do not fit a cache.
    fn matrices(
        &self,
        format: Format,
        (rows, cols): (usize, usize),
        least: usize,
    ) -> Vec<GpuMatrix> {
        let count = (BYTES / (rows * cols * format.bytes())).max(least);
        (0..count)
            .map(|n| GpuMatrix::random(&self.gpu, format, rows, cols, 0.02, n as u64).unwrap())
            .collect()
    }

    /// Seconds of each of `count` calls, replayed as one graph: the middle of some timings.
    fn seconds(&self, count: usize, call: impl Fn(usize)) -> f64 {
        call(0);
        let graph = Graph::capture(&self.gpu, || -> relufy_ops::Result<()> {
            (0..count).for_each(&call);
            Ok(())
        });
        let graph = graph.unwrap();
        graph.replay().unwrap();
        let mut times: Vec<f64> = (0..TIMES)
            .map(|_| {
                device::synchronize(&self.gpu).unwrap();
                let start = Instant::now();
                (0..3).for_each(|_| graph.replay().unwrap());
                device::synchronize(&self.gpu).unwrap();
                start.elapsed().as_secs_f64() / (3 * count) as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[TIMES / 2]
    }

    fn line(
        &self,
        name: &str,
        (format, batch): (Format, usize),
        density: f64,
        seconds: f64,
        bytes: u64,
    ) {
        let rate = bytes as f64 / seconds;
        println!(
            "{name:26} {:5} {batch:2} {:4.0} % {:8.2} us {:6.0} GB/s {:4.0} %",
            format.name(),
            100.0 * density,
            1e6 * seconds,
            rate / 1e9,
            100.0 * rate / self.read
        );
    }

    fn by_input(&self, name: &str, format: Format, (width, outputs): (usize, usize), normed: bool) {
        if !self.wants(name) {
            return;
        }
        let matrices = self.matrices(format, (width, outputs), 1);
        let gain = Tensor::ones(width, DType::F32, &self.gpu).unwrap();
        let norm = Norm { centred: false, eps: 1e-5, gain, bias: None };
        for batch in [1, 2, 4, 8] {
            let (x, y) = (self.random(batch, width), self.zeros(batch, outputs));
            for density in [0.05, 0.10, 0.20, 0.35, 0.5, 1.0] {
                if batch > 1 && ![0.35, 1.0].contains(&density) {
                    continue;
                }
                let (mask, ones) = self.mask(width, density);
                let input =
                    Input { norm: normed.then_some(&norm), mask: Some(&mask), ..Input::new(&x) };
                let output = Output::new(&y, None);
                let bytes = matrices[0].row_bytes(outputs) * ones as u64;
                let seconds = self.seconds(matrices.len(), |n| {
                    project_by_input(&input, &matrices[n], &output, &self.room).unwrap();
                });
                self.line(name, (format, batch), density, seconds, bytes);
                if batch > 1 || density != 0.35 || !self.words.iter().any(|word| word == "tiles") {
                    continue;
                }
                for columns in [32, 64, 96, 128, 256, 512] {
                    for shares in [1, 2, 3, 4, 5, 6, 8, 11, 16, 32] {
                        let blocks = outputs.div_ceil(columns) * shares;
                        if !(100..=530).contains(&blocks) {
                            continue;
                        }
                        let tiles = Tiles { columns, shares };
                        let seconds = self.seconds(matrices.len(), |n| {
                            let matrix = &matrices[n];
                            project_by_input_in(tiles, &input, matrix, &output, &self.room)
                                .unwrap();
                        });
                        let name = format!("{name} {columns} x {shares}");
                        self.line(&name, (format, batch), density, seconds, bytes);
                    }
                }
            }
        }
    }

    fn by_output(
        &self,
        name: &str,
        format: Format,
        (outputs, width): (usize, usize),
        normed: bool,
    ) {
        if !self.wants(name) {
            return;
        }
        let matrices = self.matrices(format, (outputs, width), 1);
        let gain = Tensor::ones(width, DType::F32, &self.gpu).unwrap();
        let norm = Norm { centred: false, eps: 1e-5, gain, bias: None };
        for batch in [1, 2, 4, 8] {
            let (x, y) = (self.random(batch, width), self.zeros(batch, outputs));
            let input = Input { norm: normed.then_some(&norm), ..Input::new(&x) };
            let output = Output::new(&y, None);
            let bytes = matrices[0].row_bytes(width) * outputs as u64;
            let seconds = self.seconds(matrices.len(), |n| {
                project_by_output(&input, &matrices[n], &output).unwrap();
            });
            self.line(name, (format, batch), 1.0, seconds, bytes);
        }
    }

    fn mlp(&self, format: Format) {
        if !self.wants("gate and up") && !self.wants("up rows") {
            return;
        }
        let matrices = self.matrices(format, (FFN, HIDDEN), 2);
        let relu = Pointwise::Relu;
        let row = matrices[0].row_bytes(HIDDEN);
        for batch in [1, 2, 4, 8] {
            let (h, gate) = (self.random(batch, HIDDEN), self.random(batch, FFN));
            let products = self.zeros(batch, FFN);
            let input = Input::new(&h);
            let seconds = self.seconds(matrices.len() / 2, |n| {
                let pair = ((&matrices[2 * n], None), (&matrices[2 * n + 1], None));
                gate_and_up(
                    &input,
                    pair.0,
                    pair.1,
                    (Pointwise::Silu, Pointwise::Identity),
                    &products,
                )
                .unwrap();
            });
            self.line("gate and up", (format, batch), 1.0, seconds, 2 * FFN as u64 * row);
            for density in [0.05, 0.10, 0.20, 0.35, 0.5, 1.0] {
                if batch > 1 && ![0.35, 1.0].contains(&density) {
                    continue;
                }
                let (mask, ones) = self.mask(FFN, density);
                let seconds = self.seconds(matrices.len(), |n| {
                    up_rows(&UpRows {
                        gate: &gate,
                        activation: relu,
                        mask: Some(&mask),
                        h: &h,
                        up: &matrices[n],
                        bias: None,
                        then: Pointwise::Identity,
                        products: &products,
                        counts: None,
                    })
                    .unwrap();
                });
                self.line("up rows", (format, batch), density, seconds, ones as u64 * row);
            }
        }
    }

    fn pairs(&self, format: Format) {
        const NAME: &str = "gate and up by input";
        if !self.wants(NAME) {
            return;
        }
        let columns = GpuMatrix::pair_columns(format, FFN);
        let matrices = self.matrices(format, (HIDDEN, columns), 1);
        for batch in [1, 2, 4, 8] {
            let (x, products) = (self.random(batch, HIDDEN), self.zeros(batch, FFN));
            let sums = self.zeros(batch, columns);
            for density in [0.05, 0.10, 0.20, 0.35, 0.5, 1.0] {
                if batch > 1 && ![0.35, 1.0].contains(&density) {
                    continue;
                }
                let (mask, ones) = self.mask(HIDDEN, density);
                let bytes = matrices[0].row_bytes(columns) * ones as u64;
                let seconds = self.seconds(matrices.len(), |n| {
                    let it = PairsByInput {
                        input: Input { mask: Some(&mask), ..Input::new(&x) },
                        matrix: &matrices[n],
                        biases: [None, None],
                        activation: Pointwise::Relu,
                        mask: None,
                        then: Pointwise::Identity,
                        sums: &sums,
                        products: &products,
                        counts: None,
                    };
                    pairs_by_input(&it, &self.room).unwrap();
                });
                self.line(NAME, (format, batch), density, seconds, bytes);
            }
        }
    }

    fn attention(&self, name: &str, (heads, kv_heads, head_dim): (usize, usize, usize)) {
        if !self.wants(name) {
            return;
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let heads =
            Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None };
        let plan = AttentionPlan::new(&self.gpu, &heads, None, [None, None]).unwrap();
        for (batch, len) in [(1, 16), (1, 256), (1, 1024), (1, 4096), (1, 16384), (8, 1024)] {
            let row = heads.kv_heads * head_dim;
            let each = 2 * batch * len * row * 2;
            let caches: Vec<KvCache> = (0..(BYTES / each).clamp(1, 32))
                .map(|_| {
                    let shape = (heads.kv_heads, head_dim);
                    let cache =
                        KvCache::new(&self.gpu, Format::Bf16, batch, len + 1, shape).unwrap();
                    let (k, v) = (self.random(len, row), self.random(len, row));
                    (0..batch).for_each(|b| cache.store(b, 0, &k, &v).unwrap());
                    cache
                })
                .collect();
            let qkv = self.random(batch, heads.heads * head_dim + 2 * row);
            let out = self.zeros(batch, heads.heads * head_dim);
            let positions = Words::zeros(&self.gpu, batch).unwrap();
            positions.write(&vec![len as u32; batch]).unwrap();
            let seconds = self.seconds(caches.len(), |n| {
                let (cache, out) = (&caches[n], &out);
                let it = Attention { qkv: &qkv, positions: &positions, plan: &plan, cache, out };
                attend(&it, &self.room).unwrap();
            });
            let name = format!("{name}, {len} keys");
            self.line(&name, (Format::Bf16, batch), 1.0, seconds, each as u64);
        }
    }
}

fn main() {
    let gpu = match device::open("cuda") {
        Ok(gpu) => gpu,
        Err(why) => return println!("no GPU: {why}"),
    };
    let args = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let (alone, words): (Vec<String>, Vec<String>) = args.partition(|word| word == "alone");
    set_overlap(alone.is_empty());
    let read = read_bandwidth(&gpu, 8 << 30, 5).unwrap();
    println!("a plain read of 8 GB: {:.0} GB/s", read / 1e9);
    println!(
        "{:26} {:5} {:>2} {:>6} {:>11} {:>11} {:>6}",
        "kernel", "", "B", "dense", "time", "rate", "read"
    );
    let room = Room::new(&gpu, 8, VOCAB, 71, 256).unwrap();
    let bench = Bench { gpu, room, read, words };
    for format in [Format::Bf16, Format::Int8] {
        bench.by_output("dot qkv", format, (QKV, HIDDEN), true);
        bench.by_output("dot o", format, (HIDDEN, HIDDEN), false);
        bench.by_output("dot down", format, (HIDDEN, FFN), false);
        bench.by_output("dot head", format, (VOCAB, HIDDEN), true);
        bench.mlp(format);
        bench.by_input("add qkv", format, (HIDDEN, QKV), true);
        bench.by_input("add gate", format, (HIDDEN, FFN), true);
        bench.by_input("add down", format, (FFN, HIDDEN), false);
        bench.pairs(format);
    }
    bench.attention("attention 32 (32) x 128", (32, 32, 128));
    bench.attention("attention 32 (8) x 128", (32, 8, 128));
    bench.attention("attention 71 (1) x 64", (71, 1, 64));
}
