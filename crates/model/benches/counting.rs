//! What counting the non-zeros of every token costs an evaluation's forward pass.
//!
//! The two passes take turns and the median of their ratios is printed: a machine whose speed
//! drifts by a tenth between two series of a usual benchmark would hide some per cent.
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]
#![allow(clippy::print_stdout, reason = "this is its report")]

use std::time::{Duration, Instant};

use candle_core::Device;
use relufy_model::{Decoder, Init, NoTap, Params, Point, Side, Tap, Tokens, Want};
use relufy_spec::{ReluPlan, Stage, family};
use serde_json::json;

/// Counts at every site what its matrices read.
struct Count(u64);

impl Tap for Count {
    fn want(&self, point: Point) -> Want {
        if point.side == Side::At { Want::NonzeroRows } else { Want::Nothing }
    }

    fn nonzero_rows(&mut self, _point: Point, nonzero: &[u32], _width: usize) {
        self.0 += nonzero.iter().map(|&count| u64::from(count)).sum::<u64>();
    }
}

fn decoder(hidden: usize, ffn: usize, layers: usize, heads: usize, kv_heads: usize) -> Decoder {
    let config = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": 1000, "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5});
    let spec = ReluPlan::stage(Stage::Two).apply(&family::parse(&config).unwrap().spec).unwrap();
    let init = Init { std: 0.02, scale_residual: false, seed: 1 };
    let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
    Decoder::new(spec, params).unwrap()
}

/// Pairs of passes a shape.
const PAIRS: usize = 100;

fn main() {
    for (name, decoder) in [
        ("stories3M's shape", decoder(192, 512, 6, 6, 2)),
        ("30 M parameters", decoder(512, 1792, 8, 8, 8)),
    ] {
        let ids = (0..2048).map(|n| (n * 7 % 1000) as u32).collect();
        let tokens = Tokens::rows(ids, 64);
        let time = |tap: &mut dyn Tap| {
            let started = Instant::now();
            decoder.hidden(&tokens, tap).unwrap();
            started.elapsed()
        };
        time(&mut NoTap);
        let mut pairs: Vec<(Duration, Duration)> = (0..PAIRS)
            .map(|pair| {
                // Who goes first alternates.
                if pair % 2 == 0 {
                    let plain = time(&mut NoTap);
                    (plain, time(&mut Count(0)))
                } else {
                    let counting = time(&mut Count(0));
                    (time(&mut NoTap), counting)
                }
            })
            .collect();
        let ratio =
            |(plain, counting): &(Duration, Duration)| counting.as_secs_f64() / plain.as_secs_f64();
        pairs.sort_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        let quartile = |n: usize| 100.0 * (ratio(&pairs[PAIRS * n / 4]) - 1.0);
        println!(
            "{name}: counting costs {:.1} % (quartiles {:.1} and {:.1} %, {PAIRS} pairs of {:.0} ms)",
            quartile(2),
            quartile(1),
            quartile(3),
            1e3 * pairs[PAIRS / 2].0.as_secs_f64()
        );
    }
}
