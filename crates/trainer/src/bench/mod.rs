//! The speed of a training step, without files: random weights, random tokens, one step =
//! forward, backward, clipping and AdamW. `scripts/bench_torch_cpu.py` and
//! `scripts/bench_torch_cuda.py` time the same in PyTorch.

mod peak;
mod prefill;
mod run;
mod shape;

use relufy_model::{Precision, Recompute};
use relufy_spec::Stage;
use relufy_spec::memory::TrainMemory;
use serde::Serialize;

pub use peak::PeakRate;
pub use prefill::{Prefill, prefill};
pub use run::train_steps;
pub use shape::{Family, Shape, step_flops};

use crate::config::RecomputeChoice;

/// What to time, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model and its batch.
    pub shape: Shape,
    /// The MLP's activation by its Hugging Face name; where absent [`Shape::activation`].
    pub activation: Option<String>,
    /// Surgery on the model.
    pub stage: Stage,
    /// Where to compute: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// The type of weights and activations.
    pub dtype: Precision,
    /// The type of the gradients.
    pub grad_dtype: Precision,
    /// The type of Adam's moments.
    pub moment_dtype: Precision,
    /// The same bits each time.
    pub deterministic: bool,
    /// What is computed again in the backward pass.
    pub recompute: RecomputeChoice,
    /// Largest norm of the gradient; 0: no clipping, and on a GPU each layer is stepped as soon as
    /// its gradients are final.
    pub clip: f64,
    /// Steps to time, at least one.
    pub steps: usize,
    /// Steps before, which are not timed; at least one.
    pub warmup: usize,
    /// Time the parts too. On a GPU that waits at their borders, which costs the whole a little.
    pub parts: bool,
    /// Time each kernel of one more step, on a GPU.
    pub profile: bool,
    /// TFLOP/s that the device can do at most; where absent its data sheet's, if it is known.
    pub peak_tflops: Option<f64>,
}

impl Options {
    /// The shape on the CPU.
    pub fn new(shape: Shape) -> Options {
        Options {
            shape,
            activation: None,
            stage: Stage::Dense,
            device: "cpu".to_owned(),
            dtype: Precision::Auto,
            grad_dtype: Precision::Auto,
            moment_dtype: Precision::F32,
            deterministic: true,
            recompute: RecomputeChoice::Auto,
            clip: 1.0,
            steps: 20,
            warmup: 1,
            parts: true,
            profile: false,
            peak_tflops: None,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The shape's name.
    pub shape: &'static str,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Numbers in the model.
    pub parameters: usize,
    /// The MLP's activation.
    pub activation: String,
    /// Surgery on the model.
    pub stage: Stage,
    /// What the device is called.
    pub device: String,
    /// Type of weights and activations.
    pub dtype: &'static str,
    /// Type of the gradients.
    pub grad_dtype: &'static str,
    /// Type of Adam's moments.
    pub moment_dtype: &'static str,
    /// What was computed again.
    pub recompute: Recompute,
    /// `cudnn` or `own`; `None` where there is but one way.
    pub attention: Option<&'static str>,
    /// Whether the same bits come each time.
    pub deterministic: bool,
    /// Largest norm of the gradient; 0: not clipped.
    pub clip: f64,
    /// From the median step.
    pub tokens_per_second: f64,
    /// The median step, in milliseconds.
    pub median_ms: f64,
    /// Each step, in milliseconds.
    pub step_ms: Vec<f64>,
    /// The mean step's parts, where they were timed.
    pub parts: Option<Parts>,
    /// Where the time of one step goes, the longest first, if that was asked for.
    pub profile: Vec<Work>,
    /// TFLOP/s of the median step, by [`step_flops`].
    pub model_tflops: f64,
    /// What share of `peak_rate` that is.
    pub mfu: Option<f64>,
    /// The most that the device can do, where that is known.
    pub peak_rate: Option<PeakRate>,
    /// Bytes that the step should take, by what for.
    pub planned: TrainMemory,
    /// The same in all.
    pub planned_bytes: u64,
    /// The most bytes that tensors held at a time; `None` on the CPU.
    pub peak_bytes: Option<u64>,
    /// Bytes that they held after each step, those before the timed ones included.
    pub used_after_step: Vec<u64>,
    /// Loss of the last step: what was timed has learnt.
    pub last_loss: f64,
}

/// Work of one kind in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Work {
    /// The kernel, or the product's sides.
    pub label: String,
    /// How often.
    pub calls: usize,
    /// All calls together.
    pub ms: f64,
    /// Of products: their rate.
    pub tflops: Option<f64>,
}

/// Milliseconds of the parts of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// The walk forward, and the loss with its own gradients.
    pub forward: f64,
    /// The walk back.
    pub backward: f64,
    /// Both.
    pub forward_backward: f64,
    /// The norm of all gradients.
    pub clip: f64,
    /// The optimiser, which also applies the clipping.
    pub adamw: f64,
}
