//! The engine against the dense decoder: every family, every stage, to rounding; and the work it
//! does against the count of FLOPs, to the digit.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

use candle_core::{Device, Tensor};
use relufy_model::layer::LayerPlan;
use relufy_model::{Decoder, Init, NoTap, Params, Point, Side, Tap, Tokens, Want, generate};
use relufy_ops::buffer::{to_host, write_from_host};
use relufy_ops::pointwise;
use relufy_sparse::{Engine, Error, Format, Options, Session};
use relufy_spec::flops::{ActiveCounts, active_macs, head_macs};
use relufy_spec::{
    Activation, DecoderSpec, MlpKind, PerLayer, Position, ReluPlan, Site, SiteOp, Stage, family,
};
use serde_json::{Value, json};

const VOCAB: usize = 70;

/// Small configs of every family, with every kind of block, norm, bias and position.
fn configs() -> Vec<(&'static str, Value)> {
    let base = |model_type: &str, more: Value| {
        let mut config = json!({"model_type": model_type, "vocab_size": VOCAB});
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    };
    let llama = json!({"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64});
    let with = |more: Value| {
        let mut all = llama.clone();
        if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
            all.extend(more);
        }
        all
    };
    let falcon = json!({"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6});
    let falcon_with = |more: Value| {
        let mut all = falcon.clone();
        if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
            all.extend(more);
        }
        all
    };
    vec![
        ("llama", base("llama", llama.clone())),
        ("mistral", base("mistral", with(json!({"sliding_window": 5})))),
        ("qwen2", base("qwen2", llama.clone())),
        ("qwen3", base("qwen3", with(json!({"head_dim": 16, "tie_word_embeddings": true})))),
        (
            "opt",
            base(
                "opt",
                json!({"hidden_size": 40, "ffn_dim": 150, "num_hidden_layers": 2,
                "num_attention_heads": 5, "max_position_embeddings": 64, "word_embed_proj_dim": 40,
                "activation_function": "gelu"}),
            ),
        ),
        (
            "falcon 40b",
            base(
                "falcon",
                falcon_with(json!({"num_kv_heads": 2, "new_decoder_architecture": true,
                "parallel_attn": true, "bias": false, "alibi": false})),
            ),
        ),
        (
            "falcon 7b",
            base(
                "falcon",
                falcon_with(json!({"new_decoder_architecture": false, "multi_query": true,
                "parallel_attn": true, "bias": false, "alibi": false})),
            ),
        ),
        (
            "falcon rw",
            base(
                "falcon",
                falcon_with(json!({"new_decoder_architecture": false,
                "multi_query": false, "parallel_attn": false, "bias": true, "alibi": true})),
            ),
        ),
        (
            "gpt_neox",
            base(
                "gpt_neox",
                json!({"hidden_size": 48, "intermediate_size": 130,
                "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64,
                "rotary_pct": 0.5, "hidden_act": "gelu"}),
            ),
        ),
        ("gpt2", base("gpt2", json!({"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}))),
    ]
}

fn spec(config: &Value, stage: Stage) -> DecoderSpec {
    ReluPlan::stage(stage).apply(&family::parse(config).unwrap().spec).unwrap()
}

/// Random weights; biases and norms are not what they start as in training.
fn decoder(spec: DecoderSpec) -> Decoder {
    let init = Init { std: 0.25, scale_residual: false, seed: 7 };
    let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
    for (n, param) in params.iter().enumerate().filter(|(_, param)| !param.is_matrix()) {
        let values = to_host(&param.tensor).unwrap();
        let wave = |(i, x): (usize, f32)| x + 0.2 * ((i * 7 + n * 13) as f32).sin();
        let values: Vec<f32> = values.into_iter().enumerate().map(wave).collect();
        write_from_host(&param.tensor, &values).unwrap();
    }
    Decoder::new(spec, params).unwrap()
}

/// Every config at every stage, and some decoders that no family has.
fn all() -> Vec<(String, DecoderSpec)> {
    let mut specs = Vec::new();
    for (name, config) in configs() {
        for stage in [Stage::Dense, Stage::One, Stage::Two] {
            specs.push((format!("{name} s{}", u8::from(stage)), spec(&config, stage)));
        }
    }
    let (llama, gpt2) = (configs()[0].1.clone(), configs()[9].1.clone());
    let mut plan = ReluPlan::stage(Stage::Two);
    plan.activation = Some(PerLayer::Each(vec![
        Activation::ShiftedRelu { shift: 0.3 },
        Activation::FatRelu { threshold: 0.2 },
    ]));
    for site in Site::ALL {
        let ops = vec![SiteOp::ShiftedRelu { shift: 0.1 }, SiteOp::FatRelu { threshold: 0.1 }];
        plan.set_site(site, Some(PerLayer::Each(ops)));
    }
    for (name, config) in [("llama", &llama), ("gpt2", &gpt2)] {
        let spec = family::parse(config).unwrap().spec;
        specs.push((format!("{name}, shifted at every site"), plan.apply(&spec).unwrap()));
    }
    let mut caps = spec(&llama, Stage::Two);
    caps.embedding.multiplier = Some(6.9);
    caps.head.softcap = Some(3.0);
    caps.layers.iter_mut().for_each(|layer| layer.attention.softcap = Some(2.0));
    specs.push(("soft caps".to_owned(), caps));
    let mut alibi = spec(&llama, Stage::One);
    alibi.position = Position::Alibi { bf16_slopes: false, scaled: false };
    specs.push(("alibi, unscaled".to_owned(), alibi));
    specs
}

fn options(format: Format, threads: usize) -> Options {
    Options { format, threads, context: 0 }
}

fn prompt() -> Vec<u32> {
    (0..17).map(|i| ((i * i * 11 + i * 3 + 5) % VOCAB) as u32).collect()
}

/// Logits of the dense decoder after each token.
fn dense_logits(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f32>> {
    let tokens = Tokens::packed(ids.to_vec(), [ids.len()]);
    let hidden = decoder.hidden(&tokens, &mut NoTap).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// The largest difference, as a part of the largest logit.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(0f32, |most, x| if x.is_nan() { f32::NAN } else { most.max(x) });
    apart / largest
}

fn worst(session: &mut Session, ids: &[u32], expected: &[Vec<f32>]) -> f32 {
    let each = ids
        .iter()
        .zip(expected)
        .map(|(id, expected)| distance(session.step(*id).unwrap(), expected));
    each.fold(0.0, |worst, each| if each > worst || each.is_nan() { each } else { worst })
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

#[test]
fn f32_logits_are_the_dense_decoders() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let expected = dense_logits(&decoder, &ids);
        for threads in [1, 2, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let apart = worst(&mut session, &ids, &expected);
            assert!(apart < 1e-5, "{name}, {threads} threads: {apart:e}");
        }
    }
}

#[test]
fn prompts_go_in_many_tokens_at_a_time() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let expected = dense_logits(&decoder, &ids);
        for threads in [1, 2, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            for (from, to) in [(0, 2), (2, 13), (13, 17)] {
                let apart = distance(session.prefill(&ids[from..to]).unwrap(), &expected[to - 1]);
                assert!(apart < 1e-5, "{name}, {threads} threads, to {to}: {apart:e}");
            }
        }
    }
}

#[test]
fn long_prompts_go_in_several_passes() {
    let mut config = configs()[0].1.clone();
    config["max_position_embeddings"] = json!(200);
    let ids: Vec<u32> = (0..170).map(|i| ((i * i * 7 + i) % VOCAB) as u32).collect();
    let decoder = decoder(spec(&config, Stage::Two));
    let expected = dense_logits(&decoder, &ids);
    for (format, bound) in [(Format::F32, 1e-5), (Format::F16, 6e-3)] {
        let engine = Engine::new(&decoder, &options(format, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        let apart = distance(session.prefill(&ids).unwrap(), expected.last().unwrap());
        assert!(apart < bound, "{format}: {apart:e}");
        assert_eq!((session.len(), session.left()), (170, 30));
    }
}

#[test]
fn greedy_text_is_the_dense_decoders() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec);
        let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
        let expected = generate(&decoder, &ids, 40, &[], pick, |_| true).unwrap();
        let engine = Engine::new(&decoder, &options(Format::F32, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        let mut next = argmax(session.prefill(&ids).unwrap());
        let mut found = vec![next];
        while found.len() < expected.len() {
            next = argmax(session.step(next).unwrap());
            found.push(next);
        }
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn smaller_formats_stay_within_their_rounding() {
    let ids = prompt();
    for (format, bound) in [(Format::F16, 6e-3), (Format::Bf16, 4e-2), (Format::Int8, 1.2e-1)] {
        let mut largest = (0f32, String::new());
        for (name, config) in configs() {
            for stage in [Stage::Dense, Stage::One, Stage::Two] {
                let decoder = decoder(spec(&config, stage));
                let expected = dense_logits(&decoder, &ids);
                let engine = Engine::new(&decoder, &options(format, 2)).unwrap();
                let mut session = Session::new(&engine).unwrap();
                let apart = worst(&mut session, &ids, &expected);
                if apart > largest.0 || apart.is_nan() {
                    largest = (apart, format!("{name} {stage:?}"));
                }
            }
        }
        println!("{format}: at most {:e} ({})", largest.0, largest.1);
        assert!(largest.0 < bound, "{format}, {}: {:e}", largest.1, largest.0);
    }
}

/// Non-zeros of each token at each place: what matrices read, and the gate's activation.
struct Active {
    spec: DecoderSpec,
    /// `[layer][token]`.
    counts: Vec<Vec<ActiveCounts>>,
}

impl Tap for Active {
    fn want(&self, point: Point) -> Want {
        match (point.site, point.side) {
            (_, Side::At) | (Site::DownIn, Side::Before) => Want::Values,
            _ => Want::Nothing,
        }
    }

    fn values(&mut self, point: Point, values: &Tensor) -> relufy_model::Result<()> {
        let values = match point.side {
            Side::At => values.clone(),
            Side::Before => {
                let layer = &self.spec.layers[point.layer];
                let plan = LayerPlan::new(layer, &self.spec.position);
                pointwise::forward(values, plan.activation).unwrap()
            }
        };
        let rows: Vec<Vec<f32>> = values.to_vec2().unwrap();
        for (active, row) in self.counts[point.layer].iter_mut().zip(rows) {
            let count = row.iter().filter(|x| **x != 0.0).count();
            match (point.site, point.side) {
                (Site::DownIn, Side::Before) => active.gate = count,
                (Site::QkvIn, _) => active.qkv = count,
                (Site::OIn, _) => active.o = count,
                (Site::UpIn, _) => active.up = count,
                (Site::DownIn, Side::At) => active.down = count,
            }
        }
        Ok(())
    }
}

#[test]
fn work_is_what_the_active_sets_say() {
    let ids = prompt();
    for (name, spec) in all() {
        let decoder = decoder(spec.clone());
        let none = ActiveCounts { qkv: 0, o: 0, up: 0, gate: 0, down: 0 };
        let counts = vec![vec![none; ids.len()]; spec.layers.len()];
        let mut active = Active { spec: spec.clone(), counts };
        let tokens = Tokens::packed(ids.clone(), [ids.len()]);
        decoder.hidden(&tokens, &mut active).unwrap();
        for threads in [1, 3] {
            let engine = Engine::new(&decoder, &options(Format::F32, threads)).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let mut sum = 0;
            for (t, id) in ids.iter().enumerate() {
                session.step(*id).unwrap();
                let counts = session.counts();
                let (mut needed, mut done) = (0, [0; 4]);
                for (layer, active) in spec.layers.iter().zip(&active.counts) {
                    let active = active[t];
                    needed += active_macs(spec.hidden, layer, &active);
                    let each = really_done(spec.hidden, layer, &active);
                    done.iter_mut().zip(each).for_each(|(sum, each)| *sum += each);
                }
                assert_eq!(counts.blocks().needed, needed, "{name}, token {t}");
                let found = [counts.qkv, counts.o, counts.up, counts.down].map(|work| work.done);
                assert_eq!(found, done, "{name}, token {t}");
                assert_eq!(counts.head.done, head_macs(&spec));
                sum += counts.total().done;
            }
            assert_eq!(session.total_counts().total().done, sum);
            // The needed work of a prompt is the same, however it goes in.
            let needed = session.total_counts().blocks().needed;
            session.truncate(0);
            session.prefill(&ids).unwrap();
            assert_eq!(session.counts().blocks().needed, needed, "{name}");
        }
    }
}

/// Multiply-adds of one token in one layer at QKV, O, up and down: sites without an operation are
/// dense, a row of `up` or `down` is read whole where the gate lets it through.
fn really_done(hidden: usize, layer: &relufy_spec::Layer, active: &ActiveCounts) -> [u64; 4] {
    let inputs = |site: Site, active: usize| match layer.sites.get(site) {
        SiteOp::Identity => layer.width_at(site, hidden),
        _ => active,
    };
    let gated = layer.mlp.kind == MlpKind::Gated;
    let down = match (gated, layer.sites.down_in) {
        (true, SiteOp::Identity) => active.gate,
        _ => active.down,
    };
    let macs = [
        inputs(Site::QkvIn, active.qkv) * layer.attention.qkv_width(),
        inputs(Site::OIn, active.o) * hidden,
        inputs(Site::UpIn, active.up) * layer.mlp.ffn
            + if gated { hidden * active.gate } else { 0 },
        down * hidden,
    ];
    macs.map(|macs| macs as u64)
}

#[test]
fn stage_2_reads_less() {
    let config = configs()[0].1.clone();
    let bytes = |stage| {
        let engine = Engine::new(&decoder(spec(&config, stage)), &options(Format::F16, 2)).unwrap();
        let mut session = Session::new(&engine).unwrap();
        session.prefill(&prompt()).unwrap();
        session.counts().blocks().bytes
    };
    let (dense, one, two) = (bytes(Stage::Dense), bytes(Stage::One), bytes(Stage::Two));
    assert!(two < one && one < dense, "{two} {one} {dense}");
}

#[test]
fn sequences_are_taken_back_and_do_not_disturb_each_other() {
    let ids = prompt();
    let decoder = decoder(spec(&configs()[0].1, Stage::Two));
    let engine = Engine::new(&decoder, &options(Format::F32, 2)).unwrap();
    let mut session = Session::new(&engine).unwrap();
    let all = session.prefill(&ids).unwrap().to_vec();
    session.truncate(9);
    assert_eq!((session.len(), session.left()), (9, 64 - 9));
    let mut other = Session::new(&engine.clone()).unwrap();
    other.prefill(&ids[3..8]).unwrap();
    assert!(distance(session.prefill(&ids[9..]).unwrap(), &all) < 1e-5);
    // Sessions may change threads; engines are shared between them.
    let other = std::thread::spawn(move || {
        session.truncate(1);
        let mut fresh = Session::new(&engine).unwrap();
        fresh.prefill(&ids).unwrap().to_vec()
    });
    assert_eq!(other.join().unwrap(), all);
}

#[test]
fn what_cannot_be_decoded_is_refused_and_changes_nothing() {
    let decoder = decoder(spec(&configs()[9].1, Stage::Two));
    let short = Options { context: 4, ..options(Format::F16, 1) };
    let engine = Engine::new(&decoder, &short).unwrap();
    assert_eq!((engine.context(), engine.threads(), engine.format()), (4, 1, Format::F16));
    let mut session = Session::new(&engine).unwrap();
    assert!(session.is_empty());
    assert!(matches!(session.prefill(&[]), Err(Error::EmptyPrompt)));
    assert!(matches!(session.step(70), Err(Error::TokenOutOfRange { id: 70, vocab: VOCAB })));
    assert!(matches!(session.prefill(&[1; 5]), Err(Error::ContextFull { len: 5, context: 4 })));
    session.prefill(&[1; 4]).unwrap();
    assert!(matches!(session.step(1), Err(Error::ContextFull { len: 5, context: 4 })));
    assert_eq!(session.len(), 4);
}
