//! Calibration and fitted shifts on a random model: what the numbers promise, the model does.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use candle_core::Device;
use relufy_data::{Silent, SourceConfig};
use relufy_model::checkpoint::{save_weights, write_config};
use relufy_model::{
    Checkpoint, Decoder, DensityTap, Init, Params, Point, Side, StoredDtype, Tap, Tokens, Want,
};
use relufy_spec::{ReluPlan, Site, Stage, family};
use relufy_surgery::{Error, Histogram, Options, calibrate, fit_shifts, sequences};
use serde_json::{Value, json};

fn make(folder: &Path, config: &Value) -> Checkpoint {
    let parsed = family::parse(config).unwrap();
    let init = Init { std: 0.3, seed: 3, scale_residual: false };
    let params = Params::random(&parsed.spec, &init, &Device::Cpu).unwrap();
    write_config(folder, config.as_object().unwrap()).unwrap();
    save_weights(folder, &parsed.spec, &params, &parsed.weights, StoredDtype::F32).unwrap();
    Checkpoint::open(folder).unwrap()
}

fn llama() -> Value {
    json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "vocab_size": 100,
        "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 64})
}

fn falcon() -> Value {
    json!({"model_type": "falcon", "hidden_size": 64, "vocab_size": 100,
        "num_attention_heads": 4, "num_hidden_layers": 2})
}

fn text() -> Vec<Vec<u32>> {
    (0..40).map(|row| (0..20 + row % 7).map(|i| (row * row + 31 * i) % 100).collect()).collect()
}

/// All values that a point saw.
struct Values(Point, Vec<f32>);

impl Tap for Values {
    fn want(&self, point: Point) -> Want {
        if point == self.0 { Want::Values } else { Want::Nothing }
    }

    fn values(&mut self, _: Point, values: &candle_core::Tensor) -> relufy_model::Result<()> {
        self.1.extend(values.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }
}

fn tap(decoder: &Decoder, text: &[Vec<u32>], tap: &mut dyn Tap) {
    for row in text {
        decoder.hidden(&Tokens::rows(row.clone(), row.len()), tap).unwrap();
    }
}

#[test]
fn histograms_and_densities_are_those_of_the_values() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = make(dir.path(), &llama());
    let decoder = checkpoint.load_with(&Device::Cpu, &ReluPlan::stage(Stage::Two)).unwrap();
    let text = text();
    // A small pass budget cuts the text into many passes; that must not show.
    let options = Options { batch_tokens: 64, ..Options::default() };
    let found = calibrate(&decoder, &text, &options, &Silent).unwrap();
    assert_eq!(found.tokens, text.iter().map(Vec::len).sum::<usize>() as u64);

    let mut density = DensityTap::new(3);
    tap(&decoder, &text, &mut density);
    for (n, layer) in found.layers.iter().enumerate() {
        let sites = [&layer.qkv, &layer.o, &layer.up, &layer.down];
        for (site, measured) in Site::ALL.into_iter().zip(sites) {
            assert_eq!(measured.density, density.layer(n, site));
            let point = Point { layer: n, site, side: Side::Before };
            let mut seen = Values(point, vec![]);
            tap(&decoder, &text, &mut seen);
            let edges = Histogram::edges();
            let mut counts = vec![0; edges.len() + 1];
            for value in &seen.1 {
                counts[edges.iter().filter(|edge| *edge <= value).count()] += 1;
            }
            assert_eq!(measured.histogram.counts(), counts, "layer {n} {site:?}");
            // A ReLU that is shifted by the value found drops the share that was wanted.
            for shift in &measured.shifts {
                let below = seen.1.iter().filter(|value| f64::from(**value) <= shift.value).count();
                let share = below as f64 / seen.1.len() as f64;
                assert!((share - shift.q).abs() < 2e-3, "{site:?} {}: {share}", shift.q);
            }
        }
    }
    let report = serde_json::to_value(&found).unwrap();
    let bins = report["layers"][2]["down"]["histogram"].as_array().unwrap().len();
    assert_eq!(report["edges"].as_array().unwrap().len() + 1, bins);
}

#[test]
fn branches_that_share_a_norm_see_the_same_pre_activations() {
    let dir = tempfile::tempdir().unwrap();
    let decoder = make(dir.path(), &falcon()).load(&Device::Cpu).unwrap();
    let found = calibrate(&decoder, &text(), &Options::default(), &Silent).unwrap();
    for layer in &found.layers {
        assert!(layer.up.histogram.total() > 0);
        assert_eq!(layer.up, layer.qkv);
    }
}

#[test]
fn fitted_shifts_give_every_layer_the_wanted_sparsity() {
    let dir = tempfile::tempdir().unwrap();
    for (config, stage) in [(llama(), Stage::One), (llama(), Stage::Two), (falcon(), Stage::Two)] {
        let folder = tempfile::tempdir_in(dir.path()).unwrap();
        let checkpoint = make(folder.path(), &config);
        for quantile in [0.3, 0.9] {
            let plan = ReluPlan::stage(stage);
            let fitted =
                fit_shifts(&checkpoint, &plan, quantile, &text(), &Options::default(), &Silent)
                    .unwrap();
            assert_eq!(fitted.shifts.len(), checkpoint.config().spec.layers.len());
            for sparsity in &fitted.sparsity {
                assert!((sparsity - quantile).abs() <= 0.005, "{quantile}: {sparsity}");
            }
        }
    }
}

#[test]
fn bad_requests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = make(dir.path(), &llama());
    let decoder = checkpoint.load(&Device::Cpu).unwrap();
    let none = calibrate(&decoder, &[], &Options::default(), &Silent);
    assert!(matches!(none, Err(Error::Calibration { .. })));
    for share in [0.0, 1.0, -0.5, f64::NAN] {
        let options = Options { sparsities: vec![share], ..Options::default() };
        let refused = calibrate(&decoder, &text(), &options, &Silent);
        assert!(matches!(refused, Err(Error::Calibration { .. })), "{share}");
    }
    let long = calibrate(&decoder, &[vec![1; 65]], &Options::default(), &Silent);
    let too_long =
        |error: &relufy_model::Error| matches!(error, relufy_model::Error::SequenceTooLong { .. });
    assert!(matches!(long, Err(Error::Model(error)) if too_long(&error)));
}

#[test]
fn a_corpus_is_cut_to_length_and_budget() {
    let dir = tempfile::tempdir().unwrap();
    let words: serde_json::Map<String, Value> =
        ["[UNK]", "a", "b", "c"].iter().zip(0..).map(|(w, i)| (w.to_string(), json!(i))).collect();
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}});
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = relufy_data::Tokenizer::from_folder(dir.path()).unwrap();
    let file = dir.path().join("text.jsonl");
    let lines = ["a b c a b c a", "a", "c c", "b b b b"];
    let jsonl: Vec<String> = lines.iter().map(|line| json!({"text": line}).to_string()).collect();
    std::fs::write(&file, jsonl.join("\n")).unwrap();
    let source = SourceConfig::new(file.to_string_lossy());
    let hub = relufy_data::Hub::from_env().unwrap();
    let cut = |length, tokens| sequences(&source, &hub, &tokenizer, length, tokens);

    let whole: Vec<Vec<u32>> = vec![vec![1, 2, 3], vec![1, 2, 3], vec![3, 3], vec![2, 2, 2]];
    assert_eq!(cut(3, 1000).unwrap(), whole);
    assert_eq!(cut(3, 5).unwrap(), [vec![1, 2, 3], vec![1, 2]]);
    assert!(matches!(cut(1, 10), Err(Error::Calibration { .. })));
    assert!(matches!(cut(3, 1), Err(Error::NoText { .. })));
}
