//! Values that parse but make no sense, each named with its place in the file.

use std::fmt::Display;

use relufy_model::Precision;
use relufy_ops::device;

use super::{Optim, Train, TrainConfig};
use crate::{Error, Result};

/// Where the values came from.
pub(super) struct Source<'a> {
    /// The file's name.
    pub origin: &'a str,
    /// Its text, after `--set`; empty where there is none.
    pub text: &'a str,
}

impl Source<'_> {
    /// `file:line:column` of a key, as far as that is known.
    fn place(&self, key: &str) -> String {
        match locate(self.text, key) {
            Some((line, column)) => format!("{}:{line}:{column}", self.origin),
            None => self.origin.to_string(),
        }
    }

    /// An error unless `ok`.
    fn demand(&self, ok: bool, key: &str, expected: &str, found: impl Display) -> Result<()> {
        if ok {
            return Ok(());
        }
        Err(Error::Value {
            place: self.place(key),
            key: key.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        })
    }

    fn positive(&self, key: &str, value: f64) -> Result<()> {
        self.demand(value.is_finite() && value > 0.0, key, "a number above 0", value)
    }

    fn not_negative(&self, key: &str, value: f64) -> Result<()> {
        self.demand(value.is_finite() && value >= 0.0, key, "a number of at least 0", value)
    }

    fn share(&self, key: &str, value: f64) -> Result<()> {
        self.demand((0.0..=1.0).contains(&value), key, "a share between 0 and 1", value)
    }

    fn at_least_one(&self, key: &str, value: u64) -> Result<()> {
        self.demand(value >= 1, key, "a whole number of at least 1", value)
    }
}

/// Line and column (from 1) of a dotted key in a TOML text.
fn locate(text: &str, key: &str) -> Option<(usize, usize)> {
    let document = toml_edit::Document::parse(text).ok()?;
    let mut table: &dyn toml_edit::TableLike = document.as_table();
    let mut start = None;
    for part in key.split('.') {
        let (name, item) = table.get_key_value(part)?;
        start = name.span().or_else(|| item.span()).map(|span| span.start);
        match item.as_table_like() {
            Some(inner) => table = inner,
            None => break,
        }
    }
    let before = text.get(..start?)?;
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Some((before.matches('\n').count() + 1, before[line_start..].chars().count() + 1))
}

/// Checks every value.
pub(super) fn check(config: &TrainConfig, source: &Source<'_>) -> Result<()> {
    let train = &config.train;
    source.demand(
        !config.output_dir.as_os_str().is_empty(),
        "output_dir",
        "the path of a folder",
        "nothing",
    )?;
    source.demand(
        i64::try_from(config.seed).is_ok(),
        "seed",
        "a whole number below 2^63",
        config.seed,
    )?;
    source.demand(
        !config.model.path.trim().is_empty(),
        "model.path",
        "a folder or a hub id",
        "nothing",
    )?;
    source.demand(
        config.model.stage.is_none() || config.model.plan.is_none(),
        "model.plan",
        "either `stage` or `plan`",
        "both",
    )?;
    source.demand(train.seq_len >= 2, "train.seq_len", "at least 2 tokens", train.seq_len)?;
    source.at_least_one(
        "train.per_device_train_batch_size",
        train.per_device_train_batch_size as u64,
    )?;
    source.at_least_one(
        "train.gradient_accumulation_steps",
        train.gradient_accumulation_steps as u64,
    )?;
    let tokens = (train.seq_len as u64)
        .checked_mul(train.per_device_train_batch_size as u64)
        .and_then(|tokens| tokens.checked_mul(train.gradient_accumulation_steps as u64));
    source.demand(
        tokens.is_some_and(|tokens| tokens <= u64::from(u32::MAX)),
        "train.per_device_train_batch_size",
        "fewer than 2^32 tokens a step",
        "more",
    )?;
    let lengths =
        [train.max_steps.is_some(), train.max_tokens.is_some(), train.num_train_epochs.is_some()];
    let given = lengths.into_iter().filter(|given| *given).count();
    source.demand(
        given == 1,
        "train.max_steps",
        "exactly one of `max_steps`, `max_tokens` and `num_train_epochs`",
        format!("{given} of them"),
    )?;
    for (key, value) in
        [("train.max_steps", train.max_steps), ("train.max_tokens", train.max_tokens)]
    {
        source.at_least_one(key, value.unwrap_or(1))?;
    }
    source.positive("train.num_train_epochs", train.num_train_epochs.unwrap_or(1.0))?;
    source.at_least_one("train.logging_steps", train.logging_steps)?;
    source.at_least_one("train.eval_sequences", train.eval_sequences.unwrap_or(1))?;
    source.at_least_one("train.save_total_limit", train.save_total_limit.unwrap_or(1) as u64)?;
    check_device(train, source)?;
    let validation = !config.data.validation.is_empty() || config.data.validation_fraction > 0.0;
    source.demand(
        validation || !train.dead_neurons,
        "train.dead_neurons",
        "a validation split to count over (`data.validation_fraction` or `data.validation`)",
        "none",
    )?;
    source.demand(
        !config.data.sources.is_empty(),
        "data.sources",
        "at least one source of text",
        "none",
    )?;
    check_optim(&config.optim, source)?;
    check_freeze(config, source)?;
    check_losses(config, source)
}

/// The device's name, and types that it computes in.
fn check_device(train: &Train, source: &Source<'_>) -> Result<()> {
    source.demand(
        device::is_name(&train.device),
        "train.device",
        "`cpu`, `cuda` or `cuda:N`",
        format_args!("`{}`", train.device),
    )?;
    let on_cpu = train.device == "cpu";
    for (key, precision) in [
        ("train.dtype", train.dtype),
        ("train.grad_dtype", train.grad_dtype),
        ("train.moment_dtype", train.moment_dtype),
    ] {
        source.demand(
            !on_cpu || precision != Precision::Bf16,
            key,
            "`auto` or `f32` on the CPU (`train.device = \"cuda\"` computes in bf16)",
            "`bf16`",
        )?;
    }
    source.demand(
        train.dtype != Precision::F32 || train.grad_dtype != Precision::Bf16,
        "train.grad_dtype",
        "`auto` or `f32` where `train.dtype` is `f32`",
        "`bf16`",
    )
}

fn check_optim(optim: &Optim, source: &Source<'_>) -> Result<()> {
    source.positive("optim.learning_rate", optim.learning_rate)?;
    source.demand(
        optim.warmup_steps.is_none() || optim.warmup_ratio.is_none(),
        "optim.warmup_ratio",
        "either `warmup_steps` or `warmup_ratio`",
        "both",
    )?;
    source.share("optim.warmup_ratio", optim.warmup_ratio.unwrap_or(0.0))?;
    source.share("optim.decay_ratio", optim.decay_ratio)?;
    source.share("optim.min_lr_ratio", optim.min_lr_ratio)?;
    source.not_negative("optim.weight_decay", optim.weight_decay)?;
    for (key, beta) in
        [("optim.adam_beta1", optim.adam_beta1), ("optim.adam_beta2", optim.adam_beta2)]
    {
        source.demand((0.0..1.0).contains(&beta), key, "at least 0 and below 1", beta)?;
    }
    source.positive("optim.adam_epsilon", optim.adam_epsilon)?;
    source.not_negative("optim.max_grad_norm", optim.max_grad_norm)
}

fn check_freeze(config: &TrainConfig, source: &Source<'_>) -> Result<()> {
    let freeze = &config.freeze;
    for (key, patterns) in [("freeze.train", &freeze.train), ("freeze.freeze", &freeze.freeze)] {
        for pattern in patterns {
            if let Err(error) = glob::Pattern::new(pattern) {
                source.demand(false, key, "a glob pattern", format!("`{pattern}`: {error}"))?;
            }
        }
    }
    source.at_least_one("freeze.last_layers", freeze.last_layers.unwrap_or(1) as u64)
}

fn check_losses(config: &TrainConfig, source: &Source<'_>) -> Result<()> {
    if let Some(distill) = &config.distill {
        source.demand(
            distill.weight > 0.0 && distill.weight <= 1.0,
            "distill.weight",
            "above 0 and at most 1",
            distill.weight,
        )?;
        source.positive("distill.temperature", distill.temperature)?;
    }
    let Some(regularise) = &config.regularise else { return Ok(()) };
    source.demand(
        regularise.l1.is_some() != regularise.prosparse.is_some(),
        "regularise",
        "exactly one of `l1` and `prosparse`",
        if regularise.l1.is_some() { "both" } else { "neither" },
    )?;
    source.not_negative("regularise.l1", regularise.l1.unwrap_or(0.0))?;
    let Some(stages) = &regularise.prosparse else { return Ok(()) };
    for lambda in &stages.lambda {
        source.not_negative("regularise.prosparse.lambda", *lambda)?;
    }
    source.demand(
        !stages.lambda.is_empty() && stages.lambda.len() == stages.until_step.len(),
        "regularise.prosparse.until_step",
        "one step for each value of `lambda`, at least one",
        format!("{} steps for {} values", stages.until_step.len(), stages.lambda.len()),
    )?;
    source.demand(
        stages.until_step.is_sorted_by(|a, b| a < b),
        "regularise.prosparse.until_step",
        "increasing steps",
        format!("{:?}", stages.until_step),
    )
}
