//! A real model, stories3M: with the plans of both stages the same greedy text as the dense decoder,
//! and the perplexity of each format.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::io::BufRead;
use std::path::{Path, PathBuf};

use relufy_model::{Checkpoint, Decoder, generate};
use relufy_sparse::{Engine, Format, Options, Session};
use relufy_spec::{ReluPlan, Stage};

fn folder() -> PathBuf {
    Path::new(option_env!("RELUFY_SHARED_DIR").unwrap_or_default()).join("data")
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn greedy_text_of_a_real_model_is_the_same() {
    let folder = folder().join("checkpoints/stories3M");
    let loaded = Checkpoint::open(&folder).unwrap().load(&candle_core::Device::Cpu).unwrap();
    for stage in [Stage::Dense, Stage::One, Stage::Two] {
        let spec = ReluPlan::stage(stage).apply(loaded.spec()).unwrap();
        let decoder = Decoder::new(spec, loaded.params().clone()).unwrap();
        for first in [1, 403, 1000] {
            let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
            let expected = generate(&decoder, &[1, first], 120, &[], pick, |_| true).unwrap();
            let options = Options { format: Format::F32, threads: 2, context: 0 };
            let engine = Engine::new(&decoder, &options).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let mut next = argmax(session.prefill(&[1, first]).unwrap());
            let mut found = vec![next];
            while found.len() < expected.len() {
                next = argmax(session.step(next).unwrap());
                found.push(next);
            }
            assert_eq!(found, expected, "{stage:?}");
        }
    }
}

/// The perplexity of texts, each token's logits from a step of its own.
fn perplexity(engine: &Engine, texts: &[Vec<u32>]) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    let mut session = Session::new(engine).unwrap();
    for text in texts {
        session.truncate(0);
        for pair in text.windows(2) {
            let logits = session.step(pair[0]).unwrap();
            let most = logits.iter().fold(f32::MIN, |most, x| most.max(*x));
            let total: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
            sum += total.ln() - f64::from(logits[pair[1] as usize] - most);
            count += 1;
        }
    }
    (sum / f64::from(count)).exp()
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn smaller_formats_cost_little_perplexity() {
    let checkpoint = Checkpoint::open(&folder().join("checkpoints/stories3M")).unwrap();
    let decoder = checkpoint.load(&candle_core::Device::Cpu).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let file = std::fs::File::open(folder().join("corpora/stories3m-samples.jsonl.zst")).unwrap();
    let lines = std::io::BufReader::new(zstd::Decoder::new(file).unwrap()).lines();
    let texts: Vec<Vec<u32>> = lines
        .take(30)
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            let mut ids = tokenizer.encode(line["text"].as_str().unwrap(), true).unwrap();
            ids.truncate(decoder.spec().max_positions);
            ids
        })
        .collect();
    let measured = Format::ALL.map(|format| {
        let options = Options { format, threads: 2, context: 0 };
        let engine = Engine::new(&decoder, &options).unwrap();
        let perplexity = perplexity(&engine, &texts);
        println!("{format}: perplexity {perplexity:.4}, {} bytes", engine.bytes());
        perplexity
    });
    for (format, perplexity) in Format::ALL.into_iter().zip(measured) {
        let apart = (perplexity / measured[0]).ln().abs();
        let bound = if format == Format::Int8 { 1e-2 } else { 1e-3 };
        assert!(apart < bound, "{format}: {perplexity} for {}", measured[0]);
    }
}
