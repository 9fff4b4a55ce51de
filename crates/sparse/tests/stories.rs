//! A real model, stories3M: with the plans of both stages the same greedy text as the dense decoder,
//! and the perplexity of each format.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use std::io::BufRead;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use relufy_model::layer::LayerPlan;
use relufy_model::{Checkpoint, Decoder, Point, Side, Tap, Tokens, Want, generate};
use relufy_ops::buffer::to_host;
use relufy_ops::pointwise::apply_to_slice;
use relufy_sparse::{Calibrated, Engine, Format, Options, Session, SiteThresholds, Thresholds};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{DecoderSpec, ReluPlan, Site, Stage};

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

/// The model as it is, and some stories.
fn model_and_texts(count: usize) -> (Decoder, Vec<Vec<u32>>) {
    let checkpoint = Checkpoint::open(&folder().join("checkpoints/stories3M")).unwrap();
    let decoder = checkpoint.load(&candle_core::Device::Cpu).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let file = std::fs::File::open(folder().join("corpora/stories3m-samples.jsonl.zst")).unwrap();
    let lines = std::io::BufReader::new(zstd::Decoder::new(file).unwrap()).lines();
    let texts = lines.take(count).map(|line| {
        let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        let mut ids = tokenizer.encode(line["text"].as_str().unwrap(), true).unwrap();
        ids.truncate(decoder.spec().max_positions);
        ids
    });
    let texts = texts.collect();
    (decoder, texts)
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn smaller_formats_cost_little_perplexity() {
    let (decoder, texts) = model_and_texts(30);
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

/// Magnitudes at each layer's sites, of the gate after its activation.
struct Magnitudes {
    spec: DecoderSpec,
    layers: Vec<[Vec<f32>; 4]>,
}

impl Tap for Magnitudes {
    fn want(&self, point: Point) -> Want {
        match (point.site, point.side) {
            (Site::DownIn, Side::Before) => Want::Values,
            (Site::QkvIn | Site::OIn | Site::UpIn, Side::At) => Want::Values,
            _ => Want::Nothing,
        }
    }

    fn values(&mut self, point: Point, values: &Tensor) -> relufy_model::Result<()> {
        let mut x = to_host(values).unwrap();
        if point.site == Site::DownIn {
            let plan = LayerPlan::new(&self.spec.layers[point.layer], &self.spec.position);
            apply_to_slice(&mut x, plan.activation);
        }
        self.layers[point.layer][point.site.index()].extend(x.iter().map(|x| x.abs()));
        Ok(())
    }
}

/// The thresholds that a share `density` of the magnitudes exceeds.
fn thresholds(decoder: &Decoder, texts: &[Vec<u32>], density: f64) -> Thresholds {
    let spec = decoder.spec().clone();
    let layers = vec![Default::default(); spec.layers.len()];
    let mut tap = Magnitudes { spec, layers };
    for text in texts {
        let tokens = Tokens::packed(text.clone(), [text.len()]);
        decoder.hidden(&tokens, &mut tap).unwrap();
    }
    let layers = tap.layers.into_iter().map(|mut layer| {
        let [qkv, o, up, gate] = Site::ALL.map(|site| {
            let values = &mut layer[site.index()];
            values.sort_by(f32::total_cmp);
            values[((1.0 - density) * values.len() as f64) as usize]
        });
        SiteThresholds { qkv, o, up, gate }
    });
    Thresholds { layers: layers.collect() }
}

#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn thresholds_trade_perplexity_for_density() {
    let (decoder, texts) = model_and_texts(30);
    let (measured, held_out) = texts.split_at(10);
    let options = Options { format: Format::F32, threads: 2, ..Options::default() };
    let dense = perplexity(&Engine::new(&decoder, &options).unwrap(), held_out);
    println!("dense: perplexity {dense:.4}");
    for density in [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3] {
        let found = thresholds(&decoder, measured, density);
        let each = SiteDensities { qkv: density, o: density, up: density, down: density };
        let densities = Some(Densities::uniform(decoder.spec().layers.len(), each));
        let calibrated = Calibrated { densities, thresholds: Some(found) };
        let engine = Engine::calibrated(&decoder, &options, &calibrated).unwrap();
        let perplexity = perplexity(&engine, held_out);
        let mut session = Session::new(&engine).unwrap();
        for id in &held_out[0] {
            session.step(*id).unwrap();
        }
        let (done, tokens) = (session.total_counts(), held_out[0].len() as u64);
        let all: u64 = (decoder.spec().layers.iter())
            .map(|layer| (layer.attention.qkv_width() * decoder.spec().hidden) as u64)
            .sum();
        let qkv = done.qkv.done as f64 / (tokens * all) as f64;
        println!(
            "target {density}: qkv {qkv:.3}, bytes of the layers {}, perplexity {perplexity:.4} \
             ({:+.2} %)",
            done.blocks().bytes / tokens,
            100.0 * (perplexity / dense - 1.0)
        );
        assert!((qkv - density).abs() < 0.05, "{density}: {qkv}");
        assert!(perplexity > 0.99 * dense && (density < 0.9 || perplexity < 1.01 * dense));
    }
}
