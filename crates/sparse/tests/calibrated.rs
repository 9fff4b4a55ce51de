//! Engines that know more of their model: `up` by input where densities say so, which changes rounding
//! only, and thresholds, which compute what the dense decoder does with the same numbers set to zero.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use candle_core::Tensor;
use common::{
    Active, all, argmax, configs, decoder, dense_logits, distance, largest_of, long_prompt, prompt,
    spec,
};
use relufy_model::layer::LayerPlan;
use relufy_model::{Decoder, Point, Side, Tap, Tokens, Want, generate};
use relufy_ops::buffer::{to_host, write_from_host};
use relufy_ops::pointwise::apply_to_slice;
use relufy_sparse::{
    Calibrated, Engine, Error, Format, Options, Session, SiteThresholds, Thresholds,
};
use relufy_spec::flops::{Densities, SiteDensities, active_macs};
use relufy_spec::{DecoderSpec, MlpKind, Site, SiteOp, Stage};

fn options(format: Format, threads: usize) -> Options {
    Options { format, threads, ..Options::default() }
}

/// Inputs of `up` much sparser than the gate, in every layer.
fn sparse_inputs(spec: &DecoderSpec) -> Calibrated {
    let each = SiteDensities { qkv: 0.5, o: 1.0, up: 0.1, down: 0.6 };
    let densities = Some(Densities::uniform(spec.layers.len(), each));
    Calibrated { densities, thresholds: None }
}

/// Those of [`all`] whose `up` can be stored by input.
fn gated() -> Vec<(String, DecoderSpec)> {
    let by_input = |spec: &DecoderSpec| {
        let mut layers = spec.layers.iter();
        layers
            .all(|layer| layer.mlp.kind == MlpKind::Gated && layer.sites.up_in != SiteOp::Identity)
    };
    let gated: Vec<_> = all().into_iter().filter(|(_, spec)| by_input(spec)).collect();
    assert!(gated.len() >= 5, "{}", gated.len());
    gated
}

fn worst(session: &mut Session, ids: &[u32], expected: &[Vec<f32>]) -> f32 {
    let pairs = ids.iter().zip(expected);
    largest_of(pairs.map(|(id, expected)| distance(session.step(*id).unwrap(), expected)))
}

#[test]
fn up_by_input_is_exact() {
    let ids = long_prompt();
    for (name, spec) in gated() {
        let decoder = decoder(spec.clone());
        let expected = dense_logits(&decoder, &ids);
        for threads in [1, 2, 3] {
            let options = options(Format::F32, threads);
            let engine = Engine::calibrated(&decoder, &options, &sparse_inputs(&spec)).unwrap();
            assert!(engine.up_by_input().all(|by_input| by_input) && engine.is_exact());
            let mut session = Session::new(&engine).unwrap();
            let apart = worst(&mut session, &ids, &expected);
            assert!(apart < 1e-5, "{name}, {threads} threads: {apart:e}");
            session.truncate(0);
            for (from, to) in [(0, 2), (2, 9), (9, 60)] {
                let apart = distance(session.prefill(&ids[from..to]).unwrap(), &expected[to - 1]);
                assert!(apart < 1e-5, "{name}, {threads} threads, to {to}: {apart:e}");
            }
        }
        if name.contains("shifted") {
            // A FATReLU jumps: a number that rounding carries over its threshold is another one.
            continue;
        }
        for (format, bound) in [(Format::F16, 6e-3), (Format::Bf16, 4e-2), (Format::Int8, 1.2e-1)] {
            let options = options(format, 2);
            let engine = Engine::calibrated(&decoder, &options, &sparse_inputs(&spec)).unwrap();
            let apart = worst(&mut Session::new(&engine).unwrap(), &ids, &expected);
            assert!(apart < bound, "{name}, {format}: {apart:e}");
        }
    }
}

#[test]
fn up_by_input_continues_as_the_dense_decoder_does() {
    let ids = prompt();
    for (name, spec) in gated() {
        let decoder = decoder(spec.clone());
        let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
        let expected = generate(&decoder, &ids, 40, &[], pick, |_| true).unwrap();
        let (options, calibrated) = (options(Format::F32, 2), sparse_inputs(&spec));
        let engine = Engine::calibrated(&decoder, &options, &calibrated).unwrap();
        let mut session = Session::new(&engine).unwrap();
        let mut found = vec![argmax(session.prefill(&ids).unwrap())];
        while found.len() < expected.len() {
            found.push(argmax(session.step(found[found.len() - 1]).unwrap()));
        }
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn up_by_input_is_counted_as_it_is_done() {
    let ids = prompt();
    for (name, spec) in gated() {
        let decoder = decoder(spec.clone());
        let active = Active::of(&decoder, &ids);
        for threads in [1, 3] {
            let (options, calibrated) = (options(Format::F32, threads), sparse_inputs(&spec));
            let engine = Engine::calibrated(&decoder, &options, &calibrated).unwrap();
            let mut session = Session::new(&engine).unwrap();
            for (t, id) in ids.iter().enumerate() {
                session.step(*id).unwrap();
                let counts = session.counts();
                let (mut needed, mut up, mut down) = (0, 0, 0);
                for (layer, active) in spec.layers.iter().zip(&active.counts) {
                    needed += active_macs(spec.hidden, layer, &active[t]);
                    up += 2 * active[t].up * layer.mlp.ffn;
                    down += active[t].down * spec.hidden;
                }
                assert_eq!(counts.blocks().needed, needed, "{name}, token {t}");
                assert_eq!((counts.up.done, counts.down.done), (up as u64, down as u64), "{name}");
                assert_eq!(counts.up.bytes, 4 * counts.up.done, "{name}");
            }
            let needed = session.total_counts().blocks().needed;
            session.truncate(0);
            session.prefill(&ids).unwrap();
            assert_eq!(session.counts().blocks().needed, needed, "{name}");
        }
    }
}

#[test]
fn densities_choose_layer_by_layer() {
    let spec = spec(&configs()[0].1, Stage::Two);
    let decoder = decoder(spec.clone());
    let each = |up, down| SiteDensities { qkv: 0.5, o: 1.0, up, down };
    let densities = Densities { layers: vec![each(0.33, 0.35), each(0.1, 0.6)] };
    let calibrated = Calibrated { densities: Some(densities), thresholds: None };
    let engine = Engine::calibrated(&decoder, &options(Format::F32, 2), &calibrated).unwrap();
    assert_eq!(engine.up_by_input().collect::<Vec<_>>(), [false, true]);
    let ids = prompt();
    let expected = dense_logits(&decoder, &ids);
    assert!(worst(&mut Session::new(&engine).unwrap(), &ids, &expected) < 1e-5);
    // A site without an operation has no zeros to skip, whatever a file says.
    let dense = common::decoder(common::spec(&configs()[0].1, Stage::One));
    let engine = Engine::calibrated(&dense, &options(Format::F32, 2), &calibrated).unwrap();
    assert!(!engine.up_by_input().any(|by_input| by_input));
}

/// Sets to zero in the dense decoder what thresholds take as zero, and counts what is left.
struct Dropping {
    spec: DecoderSpec,
    thresholds: Thresholds,
    /// Where the last gate was dropped.
    gate: Vec<bool>,
}

impl Tap for Dropping {
    fn want(&self, point: Point) -> Want {
        match (point.site, point.side) {
            (_, Side::At) | (Site::DownIn, Side::Before) => Want::Values,
            _ => Want::Nothing,
        }
    }

    fn values(&mut self, point: Point, values: &Tensor) -> relufy_model::Result<()> {
        let mut x = to_host(values).unwrap();
        let layer = &self.spec.layers[point.layer];
        let SiteThresholds { qkv, o, up, gate } = self.thresholds.layers[point.layer];
        let threshold = match point.site {
            Site::DownIn if point.side == Side::Before => {
                apply_to_slice(&mut x, LayerPlan::new(layer, &self.spec.position).activation);
                self.gate = x.iter().map(|x| x.abs() <= gate).collect();
                return Ok(());
            }
            Site::DownIn => {
                x.iter_mut().zip(&self.gate).filter(|(_, drop)| **drop).for_each(|(x, _)| *x = 0.0);
                0.0
            }
            Site::QkvIn => qkv,
            Site::OIn => o,
            Site::UpIn => up,
        };
        x.iter_mut().filter(|x| x.abs() <= threshold).for_each(|x| *x = 0.0);
        write_from_host(values, &x).unwrap();
        Ok(())
    }
}

fn dropping_logits(decoder: &Decoder, thresholds: &Thresholds, ids: &[u32]) -> Vec<Vec<f32>> {
    let (spec, thresholds) = (decoder.spec().clone(), thresholds.clone());
    let mut tap = Dropping { spec, thresholds, gate: Vec::new() };
    let tokens = Tokens::packed(ids.to_vec(), [ids.len()]);
    let hidden = decoder.hidden(&tokens, &mut tap).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// Other thresholds in each layer; one of norm-sharing branches.
fn thresholds(spec: &DecoderSpec) -> Thresholds {
    let each = |(n, layer): (usize, &relufy_spec::Layer)| {
        let more = n as f32 * 0.1;
        let (qkv, gate) = (0.5 + more, 0.1 + more);
        let up = if layer.shares_norm() { qkv } else { 0.3 + more };
        SiteThresholds { qkv, o: 0.2 + more, up, gate }
    };
    Thresholds { layers: spec.layers.iter().enumerate().map(each).collect() }
}

#[test]
fn thresholds_compute_the_decoder_with_small_numbers_set_to_zero() {
    drops(&prompt(), all());
}

/// Of a few only: with many numbers rounding carries one of them over its threshold at last.
#[test]
fn thresholds_hold_for_many_tokens_at_a_time() {
    let some =
        configs().into_iter().filter(|(name, _)| ["llama", "gpt2", "falcon 7b"].contains(name));
    let some: Vec<_> =
        some.map(|(name, config)| (name.to_owned(), spec(&config, Stage::Two))).collect();
    assert_eq!(some.len(), 3);
    drops(&long_prompt(), some);
}

fn drops(ids: &[u32], specs: Vec<(String, DecoderSpec)>) {
    for (name, spec) in specs {
        let decoder = decoder(spec.clone());
        let thresholds = thresholds(&spec);
        let expected = dropping_logits(&decoder, &thresholds, ids);
        let plain = dense_logits(&decoder, ids);
        for densities in [None, sparse_inputs(&spec).densities] {
            let calibrated = Calibrated { densities, thresholds: Some(thresholds.clone()) };
            let options = options(Format::F32, 2);
            let engine = Engine::calibrated(&decoder, &options, &calibrated).unwrap();
            assert!(!engine.is_exact());
            let mut session = Session::new(&engine).unwrap();
            let apart = worst(&mut session, ids, &expected);
            assert!(apart < 2e-5, "{name}: {apart:e}");
            let counts = session.total_counts();
            assert!(counts.qkv.done < ids.len() as u64 * dense_qkv(&spec), "{name}");
            assert!(counts.o.done < ids.len() as u64 * dense_o(&spec), "{name}");
            session.truncate(0);
            let many = distance(session.prefill(ids).unwrap(), &expected[ids.len() - 1]);
            assert!(many < 2e-5, "{name}, at once: {many:e}");
            assert_eq!(session.counts().blocks().needed, counts.blocks().needed, "{name}");
        }
        let far = expected.iter().zip(&plain).map(|(a, b)| distance(a, b));
        assert!(largest_of(far) > 1e-3, "{name}: nothing was dropped");
    }
}

fn dense_qkv(spec: &DecoderSpec) -> u64 {
    spec.layers.iter().map(|layer| (layer.attention.qkv_width() * spec.hidden) as u64).sum()
}

fn dense_o(spec: &DecoderSpec) -> u64 {
    spec.layers.iter().map(|layer| (layer.attention.q_width() * spec.hidden) as u64).sum()
}

#[test]
fn thresholds_of_zero_change_no_bit() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec.clone());
        let none = Thresholds { layers: vec![SiteThresholds::default(); spec.layers.len()] };
        assert!(!none.any());
        let calibrated = Calibrated { densities: None, thresholds: Some(none) };
        let options = options(Format::F16, 2);
        let engines = [
            Engine::new(&decoder, &options).unwrap(),
            Engine::calibrated(&decoder, &options, &calibrated).unwrap(),
        ];
        assert!(engines.iter().all(Engine::is_exact));
        let [a, b] = engines.map(|engine| {
            let mut session = Session::new(&engine).unwrap();
            let steps = ids.iter().map(|id| session.step(*id).unwrap().to_vec());
            (steps.collect::<Vec<_>>(), session.total_counts())
        });
        assert!(a == b, "{name}");
    }
}

#[test]
fn measurements_of_another_model_are_refused() {
    let spec = spec(&configs()[0].1, Stage::Two);
    let decoder = decoder(spec.clone());
    let refuse = |calibrated: Calibrated, why: &str| {
        let options = options(Format::F32, 1);
        match Engine::calibrated(&decoder, &options, &calibrated) {
            Err(Error::Decoder(found)) => assert!(found.contains(why), "{found}"),
            _ => panic!("{why}: not refused"),
        }
    };
    let densities = Some(Densities::dense(3));
    refuse(Calibrated { densities, thresholds: None }, "densities of 3 layers for a decoder of 2");
    for (bad, why) in [(-0.1, "a threshold of -0.1 in layer 1"), (f32::NAN, "NaN in layer 1")] {
        let layers =
            vec![SiteThresholds::default(), SiteThresholds { o: bad, ..Default::default() }];
        refuse(Calibrated { densities: None, thresholds: Some(Thresholds { layers }) }, why);
    }
    let short = Thresholds { layers: vec![SiteThresholds::default()] };
    let why = "thresholds of 1 layers for a decoder of 2";
    refuse(Calibrated { densities: None, thresholds: Some(short) }, why);
}
