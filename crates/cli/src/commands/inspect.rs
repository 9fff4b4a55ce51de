//! `relufy inspect`: what a model is, what a token costs, what it takes to run and train.

use std::fmt::Write;
use std::process::ExitCode;

use relufy_data::Tokenizer;
use relufy_model::Checkpoint;
use relufy_spec::flops::{Densities, FlopsReport, attention_macs};
use relufy_spec::memory::{Recompute, TrainShape, kv_cache_bytes, train_memory, weight_bytes};
use relufy_spec::{
    Activation, DecoderSpec, MlpKind, ParallelNorms, Position, Residual, Site, SiteOp,
};
use serde::Serialize;

use crate::human;
use crate::out;
use crate::progress::Bars;

/// Say what a model is: family, shape, sites, parameters, FLOPs per token, memory.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  relufy inspect meta-llama/Llama-2-7b-hf\n  relufy inspect FOLDER --json | jq .flops"
)]
pub struct Inspect {
    /// Folder or hub id.
    model: String,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
    /// Sequences of a training step, for the memory estimate.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    batch: u32,
    /// Tokens of a sequence, for the memory estimates; by default at most 2048.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    seq_len: Option<u32>,
}

/// Everything that is printed.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    revision: Option<&'a str>,
    family: &'a str,
    stage: u8,
    parameters: usize,
    stored_dtype: relufy_model::StoredDtype,
    spec: &'a DecoderSpec,
    flops: Flops,
    tokenizer: Option<TokenizerReport>,
    memory: Memory,
    relufication: Option<&'a relufy_spec::Relufication>,
}

/// Multiply-accumulates of a token with nothing skipped.
#[derive(Serialize)]
struct Flops {
    #[serde(flatten)]
    linear: FlopsReport,
    attention_at_seq_len: u64,
    seq_len: usize,
}

#[derive(Serialize)]
struct TokenizerReport {
    tokens: usize,
    bos: Option<u32>,
    eos: Vec<u32>,
    adds_bos: bool,
}

#[derive(Serialize)]
struct Memory {
    weights_stored: u64,
    run_f32: u64,
    train_f32: u64,
    train_f32_recompute: u64,
    batch: usize,
    seq_len: usize,
}

impl Inspect {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let checkpoint = Checkpoint::resolve(&self.model, &Bars::default())?;
        let config = checkpoint.config();
        let spec = &config.spec;
        let seq_len = (self.seq_len.unwrap_or(2048) as usize).min(spec.max_positions);
        // A model without tokenizer is still worth a look; a tokenizer that does not fit is an error.
        let has_tokenizer = checkpoint.dir().join("tokenizer.json").is_file();
        let tokenizer = if has_tokenizer { Some(checkpoint.tokenizer()?) } else { None };
        let batch = self.batch as usize;
        let train = |recompute| {
            let logits_rows = relufy_ops::loss::chunk_rows(spec.vocab);
            let shape = TrainShape::cpu(spec, batch, seq_len, logits_rows);
            train_memory(spec, &TrainShape { recompute, ..shape }).total()
        };
        let report = Report {
            model: checkpoint.name(),
            revision: checkpoint.revision(),
            family: config.family,
            stage: config.relufication.as_ref().map_or(0, |record| record.stage.into()),
            parameters: spec.parameter_count(),
            stored_dtype: checkpoint.stored_dtype(),
            spec,
            flops: Flops {
                linear: FlopsReport::new(spec, &Densities::dense(spec.layers.len())),
                attention_at_seq_len: attention_macs(spec, seq_len),
                seq_len,
            },
            tokenizer: tokenizer.as_ref().map(tokenizer_report),
            memory: Memory {
                weights_stored: weight_bytes(spec, checkpoint.stored_dtype().size()),
                run_f32: weight_bytes(spec, 4) + kv_cache_bytes(spec, 1, seq_len, 4),
                train_f32: train(Recompute::None),
                train_f32_recompute: train(Recompute::Block),
                batch,
                seq_len,
            },
            relufication: config.relufication.as_ref(),
        };
        if self.json {
            out::line(serde_json::to_string_pretty(&report)?)?;
        } else {
            out::print(text(&report)?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn tokenizer_report(tokenizer: &Tokenizer) -> TokenizerReport {
    TokenizerReport {
        tokens: tokenizer.vocab_size(),
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_ids().to_vec(),
        adds_bos: tokenizer.adds_bos(),
    }
}

fn text(report: &Report<'_>) -> Result<String, std::fmt::Error> {
    let Report { spec, flops, memory, .. } = report;
    let mut out = String::new();
    let mut line = |key: &str, value: String| writeln!(out, "{key:<15} {value}");
    line("model", report.model.to_owned())?;
    if let Some(revision) = report.revision {
        line("revision", revision.to_owned())?;
    }
    line("family", report.family.to_owned())?;
    line("stage", stage(report))?;
    line(
        "parameters",
        format!("{} ({:?})", human::count(report.parameters as f64), report.stored_dtype),
    )?;
    line("layers", format!("{} x {}", spec.layers.len(), shape(spec)))?;
    line(
        "vocabulary",
        format!("{}, head {}", spec.vocab, if spec.head.tied { "tied" } else { "untied" }),
    )?;
    line("positions", positions(spec))?;
    line("block", block(spec))?;
    for site in Site::ALL {
        line(&format!("site {}", site.short()), site_text(spec, site))?;
    }
    line(
        "MACs per token",
        format!(
            "{} blocks, {} with head, {} as the paper counts; attention {} at {} tokens",
            human::count(flops.linear.blocks),
            human::count(flops.linear.with_head),
            human::count(flops.linear.paper_compat),
            human::count(flops.attention_at_seq_len as f64),
            flops.seq_len,
        ),
    )?;
    line(
        "tokenizer",
        match &report.tokenizer {
            None => "none in the folder".to_owned(),
            Some(tokenizer) => format!(
                "{} tokens, BOS {}, EOS {:?}",
                tokenizer.tokens,
                match (tokenizer.bos, tokenizer.adds_bos) {
                    (Some(bos), true) => format!("{bos} (added)"),
                    (Some(bos), false) => format!("{bos} (not added)"),
                    (None, _) => "none".to_owned(),
                },
                tokenizer.eos,
            ),
        },
    )?;
    line(
        "memory",
        format!(
            "{} stored; to run {} (f32, {} tokens); to train {} (f32, {} x {}), {} with recompute",
            human::bytes(memory.weights_stored),
            human::bytes(memory.run_f32),
            memory.seq_len,
            human::bytes(memory.train_f32),
            memory.batch,
            memory.seq_len,
            human::bytes(memory.train_f32_recompute),
        ),
    )?;
    Ok(out)
}

fn stage(report: &Report<'_>) -> String {
    match report.relufication {
        None => "0 (as it came)".to_owned(),
        Some(record) => format!(
            "{} of {}, fine-tuned for {} tokens",
            report.stage,
            record.source.as_ref().map_or("an unnamed model", |source| source.model.as_str()),
            human::count(record.tokens_trained as f64),
        ),
    }
}

fn shape(spec: &DecoderSpec) -> String {
    let Some(layer) = spec.layers.first() else { return "none".to_owned() };
    let (attention, mlp) = (&layer.attention, &layer.mlp);
    let heads = match attention.kv_heads {
        kv if kv == attention.heads => format!("{} heads", attention.heads),
        1 => format!("{} heads, 1 for keys and values", attention.heads),
        kv => format!("{} heads, {kv} for keys and values", attention.heads),
    };
    let window = attention.window.map_or(String::new(), |window| format!(", window {window}"));
    format!(
        "hidden {}, {heads} of {}{window}, {} MLP of {}",
        spec.hidden,
        attention.head_dim,
        match mlp.kind {
            MlpKind::Plain => "plain",
            MlpKind::Gated => "gated",
        },
        mlp.ffn,
    )
}

fn positions(spec: &DecoderSpec) -> String {
    let max = spec.max_positions;
    match &spec.position {
        Position::Rope { theta, rotary_dim, scaling, .. } => {
            let scaling = match scaling {
                relufy_spec::RopeScaling::None {} => String::new(),
                relufy_spec::RopeScaling::Linear { factor } => format!(", scaled by {factor}"),
                relufy_spec::RopeScaling::Llama3 { factor, .. } => {
                    format!(", llama3 scaling by {factor}")
                }
            };
            format!("{max}, rotary over {rotary_dim} dimensions, theta {theta}{scaling}")
        }
        Position::Learned { .. } => format!("{max}, learned"),
        Position::Alibi { .. } => format!("{max}, ALiBi"),
    }
}

fn block(spec: &DecoderSpec) -> String {
    let Some(layer) = spec.layers.first() else { return "none".to_owned() };
    let residual = match layer.residual {
        Residual::Sequential {} => "attention, then MLP",
        Residual::Parallel { norms: ParallelNorms::Shared } => {
            "attention and MLP in parallel behind one norm"
        }
        Residual::Parallel { norms: ParallelNorms::Separate } => {
            "attention and MLP in parallel, a norm each"
        }
    };
    let norm = match layer.norm.kind {
        relufy_spec::NormKind::LayerNorm {} => "LayerNorm",
        relufy_spec::NormKind::Rms { .. } => "RMSNorm",
    };
    format!("{norm}, {residual}")
}

/// What stands at a site, over all layers.
fn site_text(spec: &DecoderSpec, site: Site) -> String {
    let mut seen: Vec<String> = Vec::new();
    for layer in &spec.layers {
        let mut parts = Vec::new();
        if site == Site::DownIn {
            let gate = if layer.mlp.kind == MlpKind::Gated { " gate" } else { "" };
            parts.push(format!("{}{gate}", activation(layer.mlp.activation)));
        }
        match layer.sites.get(site) {
            SiteOp::Identity if parts.is_empty() => parts.push("nothing (dense)".to_owned()),
            SiteOp::Identity => {}
            SiteOp::Relu => parts.push("ReLU".to_owned()),
            SiteOp::ShiftedRelu { shift } => parts.push(format!("ReLU(x - {shift})")),
            SiteOp::FatRelu { threshold } => parts.push(format!("FATReLU at {threshold}")),
        }
        let text = parts.join(", then ");
        if !seen.contains(&text) {
            seen.push(text);
        }
    }
    match seen.as_slice() {
        [one] => one.clone(),
        many if many.len() > 3 => {
            format!("differs by layer ({} kinds, from {})", many.len(), many[0])
        }
        many => many.join(" | "),
    }
}

fn activation(activation: Activation) -> String {
    match activation {
        Activation::Silu => "SiLU".to_owned(),
        Activation::Gelu => "GELU".to_owned(),
        Activation::GeluTanh => "GELU (tanh)".to_owned(),
        Activation::Swish { beta } => format!("x sigmoid({beta} x)"),
        Activation::Relu => "ReLU".to_owned(),
        Activation::ShiftedRelu { shift } => format!("ReLU(x - {shift})"),
        Activation::FatRelu { threshold } => format!("FATReLU at {threshold}"),
    }
}
