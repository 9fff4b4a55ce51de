//! What a run will do and take, worked out before it starts.

use std::path::PathBuf;

use relufy_spec::memory::{Recompute, TrainMemory};
use serde::Serialize;

/// What a run will do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Hub id or folder name of the model.
    pub model: String,
    /// Its parameters.
    pub parameters: usize,
    /// How many of them are trained.
    pub trained_parameters: usize,
    /// Checkpoint tensors that are trained, and all of them.
    pub tensors: (usize, usize),
    /// Steps that a checkpoint already holds.
    pub start_step: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Tokens of one step, padding included.
    pub tokens_per_step: u64,
    /// Tokens of the whole run.
    pub tokens: u64,
    /// Tokens in one pass over the training split.
    pub tokens_per_epoch: u64,
    /// Passes over the training split in the whole run.
    pub epochs: f64,
    /// Sequences of the validation split that are evaluated; 0: there is none.
    pub validation_sequences: u64,
    /// Where it computes.
    pub device: String,
    /// The number type of weights in use and activations.
    pub dtype: &'static str,
    /// What is computed again in the backward pass.
    pub recompute: Recompute,
    /// Memory at its peak, worked out from shapes.
    pub memory: TrainMemory,
    /// Bytes of the teacher's weights; 0 without one.
    pub teacher_memory: u64,
    /// Bytes that the GPU had free before anything was loaded; `None` on the CPU.
    pub free_memory: Option<u64>,
    /// Measured time of one step, where it was measured.
    pub seconds_per_step: Option<f64>,
    /// Settings that differ from those of the checkpoint that is continued.
    pub changed_settings: Vec<String>,
    /// The run's folder.
    pub output_dir: PathBuf,
}

impl Plan {
    /// Bytes of memory in all.
    pub fn memory_total(&self) -> u64 {
        self.memory.total().saturating_add(self.teacher_memory)
    }

    /// Seconds until the end, from the measured step; validation and saving not counted.
    pub fn seconds(&self) -> Option<f64> {
        let steps = self.max_steps.saturating_sub(self.start_step) as f64;
        self.seconds_per_step.map(|seconds| seconds * steps)
    }
}
