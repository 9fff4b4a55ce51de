//! The sections of a run's file, with their defaults.

use relufy_model::{Precision, Recompute};
use relufy_spec::{ReluPlan, Stage};
use serde::{Deserialize, Serialize};

/// Seed where the file names none (as in Hugging Face's trainer).
pub(super) fn default_seed() -> u64 {
    42
}

/// `[model]`: what is trained.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A Hugging Face folder or a hub id (`org/name[@revision]`).
    pub path: String,
    /// Relufy to this stage in memory before training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// Relufy by this plan in memory before training; not together with `stage`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<ReluPlan>,
}

/// `[train]`: how long, in which batches, and what is written when.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Keep attention inside documents and restart positions with each.
    #[serde(default = "yes")]
    pub document_boundaries: bool,
    /// Sequences of one forward pass.
    #[serde(default = "default_batch")]
    pub per_device_train_batch_size: usize,
    /// Forward passes of one optimiser step.
    #[serde(default = "one")]
    pub gradient_accumulation_steps: usize,
    /// Optimiser steps of the run; exactly one of `max_steps`, `max_tokens` and
    /// `num_train_epochs` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Tokens of the run, rounded up to whole steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// Passes over the training split, rounded up to whole steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_train_epochs: Option<f64>,
    /// Steps between two lines of metrics.
    #[serde(default = "default_logging")]
    pub logging_steps: u64,
    /// Steps between two validations; 0: only at the end.
    #[serde(default = "default_every")]
    pub eval_steps: u64,
    /// Validate before the first step too.
    #[serde(default)]
    pub eval_on_start: bool,
    /// Validate on so many sequences of the validation split at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_sequences: Option<u64>,
    /// Steps between two checkpoints, and one at the end; 0: only the final model.
    #[serde(default = "default_every")]
    pub save_steps: u64,
    /// Keep so many checkpoints; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// Where to compute: `cpu`, `cuda` (the first GPU) or `cuda:N`.
    #[serde(default = "default_device")]
    pub device: String,
    /// The number type of weights and activations: `auto` (f32 on the CPU, bf16 on a GPU), `f32` or
    /// `bf16`. Whatever it is, the optimiser steps weights of 32 bit.
    #[serde(default)]
    pub dtype: Precision,
    /// That of the gradients: `auto` is `dtype`, or `f32` where forward passes accumulate.
    #[serde(default)]
    pub grad_dtype: Precision,
    /// That of Adam's two moments: `f32`, or `bf16` on a GPU, which lets larger models fit.
    #[serde(default = "default_moments")]
    pub moment_dtype: Precision,
    /// The same run on the same GPU gives the same numbers, bit for bit.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// What is computed again in the backward pass instead of being kept: `none`, the `inputs` of
    /// the matrices, each `block` from its input (gradient checkpointing), or `auto`: the least
    /// that fits the GPU's memory.
    #[serde(default)]
    pub recompute: RecomputeChoice,
    /// Count, at each validation, the neurons that no validation token activates.
    #[serde(default)]
    pub dead_neurons: bool,
    /// Write TensorBoard events beside `metrics.jsonl`.
    #[serde(default = "yes")]
    pub tensorboard: bool,
}

/// `train.recompute`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecomputeChoice {
    /// The least that fits the GPU's memory; nothing on the CPU.
    #[default]
    Auto,
    /// Every activation is kept.
    None,
    /// The norms' outputs and what `down` reads are made again.
    Inputs,
    /// Only what enters each block is kept.
    Block,
}

impl RecomputeChoice {
    /// What was asked for; `None` where it is to be chosen.
    pub fn fixed(self) -> Option<Recompute> {
        match self {
            RecomputeChoice::Auto => None,
            RecomputeChoice::None => Some(Recompute::None),
            RecomputeChoice::Inputs => Some(Recompute::Inputs),
            RecomputeChoice::Block => Some(Recompute::Block),
        }
    }
}

impl std::str::FromStr for RecomputeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<RecomputeChoice, String> {
        match text {
            "auto" => Ok(RecomputeChoice::Auto),
            "none" => Ok(RecomputeChoice::None),
            "inputs" => Ok(RecomputeChoice::Inputs),
            "block" => Ok(RecomputeChoice::Block),
            _ => Err("expected auto, none, inputs or block".to_owned()),
        }
    }
}

/// `[optim]`: AdamW and its schedule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optim {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How the rate falls after the warm-up.
    pub lr_scheduler_type: LrScheduler,
    /// Steps in which the rate rises linearly from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The same as a share of all steps; not together with `warmup_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Share of all steps in which `wsd` falls, at the end.
    pub decay_ratio: f64,
    /// The rate never falls below this share of `learning_rate`.
    pub min_lr_ratio: f64,
    /// Decoupled decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Memory of the first moment.
    pub adam_beta1: f64,
    /// Memory of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Largest L2 norm of all gradients together; 0: no clipping. Without it, and without
    /// accumulation, a GPU steps each layer as soon as its gradients are final, so that all of
    /// them never exist at once; their norm is then summed up on the way.
    pub max_grad_norm: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Optim {
            learning_rate: 5e-5,
            lr_scheduler_type: LrScheduler::Cosine,
            warmup_steps: None,
            warmup_ratio: None,
            decay_ratio: 0.2,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
        }
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Half a cosine down to the minimum.
    Cosine,
    /// A straight line down to the minimum.
    Linear,
    /// Not at all.
    Constant,
    /// Warm-up, stable, decay: constant, then a straight line over the last
    /// `decay_ratio` of the steps.
    Wsd,
}

/// `[freeze]`: which tensors are trained. A tensor is trained if it passes all three.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Freeze {
    /// Only tensors whose checkpoint name one of these globs matches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub train: Vec<String>,
    /// No tensor whose checkpoint name one of these globs matches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// Only the last so many layers and what follows them (final norm, untied head).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_layers: Option<usize>,
}

/// `[distill]`: `(1 - weight) * LM loss + weight * T^2 * KL(teacher || student)`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distill {
    /// The teacher; where absent, `model.path` as it was before the surgery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Share of the teacher's term in the loss, above 0 and up to 1.
    #[serde(default = "half")]
    pub weight: f64,
    /// Both distributions are flattened by this temperature.
    #[serde(default = "one_f64")]
    pub temperature: f64,
}

/// `[regularise]`: an L1 term on the inputs of the down projections (the gated product),
/// added to the loss as `lambda * mean |h|`. Exactly one of the two is given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Regularise {
    /// The same factor at every step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l1: Option<f64>,
    /// ProSparse's progressive factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prosparse: Option<ProSparse>,
}

/// Stages of ProSparse: the factor goes along half a sine wave from each stage's value to
/// the next one's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProSparse {
    /// The factor at the end of each stage; the first holds from the start.
    pub lambda: Vec<f64>,
    /// The step at which each stage ends, increasing.
    pub until_step: Vec<u64>,
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

fn one_f64() -> f64 {
    1.0
}

fn half() -> f64 {
    0.5
}

fn default_device() -> String {
    "cpu".to_owned()
}

fn default_moments() -> Precision {
    Precision::F32
}

fn default_batch() -> usize {
    8
}

fn default_logging() -> u64 {
    10
}

fn default_every() -> u64 {
    500
}
