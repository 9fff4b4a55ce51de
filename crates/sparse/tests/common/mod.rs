//! Small decoders of every family, and what the engines are held against: shared by the tests of the
//! engines on the CPU and on a GPU.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses its part")]

use candle_core::{Device, Tensor};
use relufy_model::layer::LayerPlan;
use relufy_model::{Decoder, Init, NoTap, Params, Point, Side, Tap, Tokens, Want};
use relufy_ops::buffer::{to_host, write_from_host};
use relufy_ops::pointwise;
use relufy_spec::flops::ActiveCounts;
use relufy_spec::{
    Activation, DecoderSpec, MlpKind, PerLayer, Position, ReluPlan, Site, SiteOp, Stage, family,
};
use serde_json::{Value, json};

pub const VOCAB: usize = 70;

/// Small configs of every family, with every kind of block, norm, bias and position.
pub fn configs() -> Vec<(&'static str, Value)> {
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

pub fn spec(config: &Value, stage: Stage) -> DecoderSpec {
    ReluPlan::stage(stage).apply(&family::parse(config).unwrap().spec).unwrap()
}

/// Random weights; biases and norms are not what they start as in training.
pub fn decoder(spec: DecoderSpec) -> Decoder {
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
pub fn all() -> Vec<(String, DecoderSpec)> {
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

pub fn prompt() -> Vec<u32> {
    (0..17).map(|i| ((i * i * 11 + i * 3 + 5) % VOCAB) as u32).collect()
}

/// One that is long enough for many tokens at a time.
pub fn long_prompt() -> Vec<u32> {
    (0..60).map(|i| ((i * i * 7 + i * 5 + 3) % VOCAB) as u32).collect()
}

/// Logits of the dense decoder after each token.
pub fn dense_logits(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f32>> {
    let tokens = Tokens::packed(ids.to_vec(), [ids.len()]);
    let hidden = decoder.hidden(&tokens, &mut NoTap).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// The largest difference, as a part of the largest logit; NaN where anything is.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    largest_of(found.iter().zip(expected).map(|(a, b)| (a - b).abs())) / largest
}

/// The largest of some numbers; NaN where one is.
pub fn largest_of(numbers: impl IntoIterator<Item = f32>) -> f32 {
    let larger = |most: f32, x: f32| if x > most || x.is_nan() { x } else { most };
    numbers.into_iter().fold(0.0, |most, x| if most.is_nan() { most } else { larger(most, x) })
}

pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// Non-zeros of each token at each place: what matrices read, and the gate's activation.
pub struct Active {
    pub spec: DecoderSpec,
    /// `[layer][token]`.
    pub counts: Vec<Vec<ActiveCounts>>,
}

impl Active {
    /// Those of one sequence.
    pub fn of(decoder: &Decoder, ids: &[u32]) -> Active {
        let none = ActiveCounts { qkv: 0, o: 0, up: 0, gate: 0, down: 0 };
        let spec = decoder.spec().clone();
        let counts = vec![vec![none; ids.len()]; spec.layers.len()];
        let mut active = Active { spec, counts };
        let tokens = Tokens::packed(ids.to_vec(), [ids.len()]);
        decoder.hidden(&tokens, &mut active).unwrap();
        active
    }
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

/// Multiply-adds of one token in one layer at QKV, O, up and down: sites without an operation are
/// dense, a row of `up` or `down` is read whole where the gate lets it through.
pub fn really_done(hidden: usize, layer: &relufy_spec::Layer, active: &ActiveCounts) -> [u64; 4] {
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
