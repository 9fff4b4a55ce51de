//! Tokens per second of the shape M at forced densities, the share of what memory gives, and the
//! speed-up over the own dense decoder against what the bytes allow.
//!
//! Everything takes turns, token by token, and ratios are medians: the machine's speed drifts.
//! `cargo bench -p relufy-sparse -- [f16] [int8] [threads=N] [tokens=N]`
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]
#![allow(clippy::print_stdout, reason = "this is its report")]

use std::time::Instant;

use relufy_sparse::bench::{RawRead, Timer, median, shape_m};
use relufy_sparse::{Engine, Format, Options, Session};
use relufy_spec::Stage;
use relufy_spec::flops::SiteDensities;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: usize| {
        let value = args.iter().find_map(|arg| arg.strip_prefix(name));
        value.map_or(default, |value| value.parse().unwrap())
    };
    let (threads, tokens) = (number("threads=", 0), number("tokens=", 60));
    let named: Vec<Format> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let formats = if named.is_empty() { vec![Format::F16, Format::Int8] } else { named };
    for format in formats {
        measure(format, threads, tokens);
    }
}

fn measure(format: Format, threads: usize, tokens: usize) {
    let options = Options { format, threads, context: 256 };
    let engine = |stage| Engine::random(&shape_m(stage).unwrap(), &options, 1).unwrap();
    let (dense, sparse) = (engine(Stage::Dense), engine(Stage::Two));
    let at = |qkv, up, down| Some(SiteDensities { qkv, o: 1.0, up, down });
    let names = ["dense", "Llama s2 49/33/35 %", "Falcon s2 44/44/5 %"];
    let mut timers = [
        Timer::new(&dense, None, 16).unwrap(),
        Timer::new(&sparse, at(0.49, 0.33, 0.35), 16).unwrap(),
        Timer::new(&sparse, at(0.44, 0.44, 0.05), 16).unwrap(),
    ];
    let raw = RawRead::new(1 << 30).unwrap();
    for timer in &mut timers {
        // Nothing is warm before.
        for _ in 0..2 {
            timer.step().unwrap();
        }
    }
    let mut seconds = [const { Vec::new() }; 3];
    let (mut reads, mut shares) = (Vec::new(), Vec::new());
    let mut faster = [const { Vec::new() }; 3];
    for _ in 0..tokens {
        let read = raw.bandwidth(&dense);
        reads.push(read);
        let now = timers.each_mut().map(|timer| timer.step().unwrap());
        shares.push(timers[0].counts().total().bytes as f64 / now[0] / read);
        for (n, now_n) in now.iter().enumerate() {
            seconds[n].push(*now_n);
            faster[n].push(now[0] / now_n);
        }
    }
    let read = median(&reads);
    println!(
        "{format}, {} threads, {tokens} tokens in turns, raw read {:.1} GB/s",
        dense.threads(),
        read / 1e9
    );
    let bytes = timers.each_ref().map(|timer| timer.counts().total().bytes as f64);
    for n in 0..3 {
        let (median_seconds, speedup) = (median(&seconds[n]), median(&faster[n]));
        let allowed = bytes[0] / bytes[n];
        println!(
            "  {:20} {:6.2} tokens/s  {:7.1} MB a token  {:5.1} % of raw read  {speedup:.2} x dense, bytes allow {allowed:.2} x ({:.0} %)",
            names[n],
            1.0 / median_seconds,
            bytes[n] / 1e6,
            100.0 * bytes[n] / median_seconds / read,
            100.0 * speedup / allowed,
        );
    }
    let prompt = vec![1; 129];
    let mut session = Session::new(&sparse).unwrap();
    let prefill: Vec<f64> = (0..3)
        .map(|_| {
            session.truncate(0);
            let start = Instant::now();
            session.prefill(&prompt).unwrap();
            start.elapsed().as_secs_f64()
        })
        .collect();
    println!("  a prompt of 129 tokens: {:.1} tokens/s", 129.0 / median(&prefill));
    println!(
        "  dense, each token by the reading before it: {:.1} % of raw read",
        100.0 * median(&shares)
    );
}
