//! The speed of a training step, without files: random weights, random tokens, one step =
//! forward, backward, clipping to 1.0 and AdamW. The shapes are those that
//! `scripts/bench_torch_cpu.py` times in PyTorch.

use std::time::Instant;

use candle_core::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use relufy_model::{Decoder, Gradients, Init, NoTap, Objective, Params, Tokens, Trainable};
use relufy_spec::family;
use serde::Serialize;
use serde_json::json;

use crate::Result;
use crate::config::Optim;
use crate::optimizer::{Decay, Optimizer};

/// A Llama with ReLU, head untied, and the batch it is trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// What people call it.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Heads, of queries as of keys and values.
    pub heads: usize,
    /// Neurons of a layer.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
}

impl Shape {
    /// About 5 M parameters.
    pub const SMALL: Shape = Shape {
        name: "small",
        hidden: 256,
        layers: 4,
        heads: 4,
        ffn: 704,
        vocab: 4096,
        batch: 4,
        seq_len: 128,
    };

    /// About 30 M parameters.
    pub const MEDIUM: Shape = Shape {
        name: "medium",
        hidden: 512,
        layers: 8,
        heads: 8,
        ffn: 1408,
        vocab: 4096,
        batch: 8,
        seq_len: 256,
    };

    /// Tokens of a step.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq_len
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The shape.
    pub shape: Shape,
    /// From the median step.
    pub tokens_per_second: f64,
    /// Each step, in milliseconds.
    pub step_ms: Vec<f64>,
    /// The mean step's parts, in milliseconds.
    pub parts: Parts,
    /// Loss of the last step: what was timed has learnt.
    pub last_loss: f64,
}

/// Milliseconds of the parts of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// Loss and gradients.
    pub forward_backward: f64,
    /// The norm of all gradients.
    pub clip: f64,
    /// The optimiser, which also applies the clipping.
    pub adamw: f64,
}

/// Trains `shape` for `steps` steps (at least one) after one that is not timed.
///
/// # Errors
/// From the model; a shape that no model can have.
pub fn train_steps(shape: Shape, steps: usize) -> Result<Measured> {
    let config = family::parse(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "relu",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "vocab_size": shape.vocab,
        "max_position_embeddings": shape.seq_len, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    }))?;
    let params = Params::random(&config.spec, &Init::default(), &Device::Cpu)?;
    let decoder = Decoder::new(config.spec, params)?;
    let mut gradients = Gradients::new(decoder.params(), &Trainable::all(decoder.params()))?;
    let settings = Optim { learning_rate: 1e-3, max_grad_norm: 1.0, ..Optim::default() };
    let mut optimizer = Optimizer::new(&gradients, &settings, Decay::Matrices)?;
    let (tokens, targets) = random_batch(&shape);
    let objective = Objective { scale: 1.0 / targets.len() as f32, ..Objective::default() };

    let mut step_ms = Vec::with_capacity(steps);
    let mut parts = Parts::default();
    let mut last_loss = f64::NAN;
    for step in 0..=steps.max(1) {
        let began = Instant::now();
        gradients.begin_step();
        let loss =
            decoder.forward_backward(&tokens, &targets, &objective, &mut gradients, &mut NoTap)?;
        let differentiated = Instant::now();
        let clip = optimizer.clip_factor(gradients.global_norm()?);
        let clipped = Instant::now();
        optimizer.step(decoder.params(), &gradients, settings.learning_rate, clip)?;
        let ended = Instant::now();
        last_loss = loss.mean();
        if step == 0 {
            continue; // warms caches, allocator and tables
        }
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        step_ms.push(ms(began, ended));
        parts.forward_backward += ms(began, differentiated);
        parts.clip += ms(differentiated, clipped);
        parts.adamw += ms(clipped, ended);
    }
    let count = step_ms.len() as f64;
    for part in [&mut parts.forward_backward, &mut parts.clip, &mut parts.adamw] {
        *part /= count;
    }
    let tokens_per_second = shape.tokens() as f64 / median(&step_ms) * 1e3;
    Ok(Measured { shape, tokens_per_second, step_ms, parts, last_loss })
}

/// Random tokens that predict one another in rows; the last of a row predicts nothing.
fn random_batch(shape: &Shape) -> (Tokens, Vec<i64>) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let ids: Vec<u32> =
        (0..shape.tokens()).map(|_| random.random_range(0..shape.vocab as u32)).collect();
    let last_of_row = |at: usize| (at + 1).is_multiple_of(shape.seq_len);
    let target = |at: usize| match ids.get(at + 1) {
        Some(next) if !last_of_row(at) => i64::from(*next),
        _ => relufy_model::IGNORE,
    };
    let targets = (0..ids.len()).map(target).collect();
    (Tokens::rows(ids, shape.seq_len), targets)
}

/// The middle value, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_timed_learns() {
        let tiny = Shape { hidden: 32, layers: 2, heads: 2, ffn: 48, vocab: 64, ..Shape::SMALL };
        let first = train_steps(tiny, 1).unwrap();
        let later = train_steps(tiny, 12).unwrap();
        assert_eq!(later.step_ms.len(), 12);
        assert!(later.last_loss < first.last_loss - 0.05);
        assert!(later.tokens_per_second > 0.0);
        let sum = later.parts.forward_backward + later.parts.clip + later.parts.adamw;
        let mean = later.step_ms.iter().sum::<f64>() / 12.0;
        assert!((sum - mean).abs() < 1e-6 * mean);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
