//! How a run says how far it has come. Whoever watches decides how that looks.

use std::path::Path;

use relufy_model::DensityTap;

use crate::plan::Plan;
use crate::trainer::Summary;

/// Watches a run; every method does nothing unless it is overridden.
pub trait Observer {
    /// The run begins, or continues at `plan.start_step`.
    fn started(&mut self, plan: &Plan) {
        let _ = plan;
    }

    /// An optimiser step is done.
    fn step(&mut self, report: &StepReport<'_>) {
        let _ = report;
    }

    /// The validation split was evaluated after `step` steps.
    fn validated(&mut self, step: u64, validation: &Validation) {
        let _ = (step, validation);
    }

    /// A checkpoint lies at `path`, whole.
    fn saved(&mut self, step: u64, path: &Path) {
        let _ = (step, path);
    }

    /// Something worth a line.
    fn note(&mut self, text: &str) {
        let _ = text;
    }

    /// The run was told to stop; all that is needed to resume is saved.
    fn interrupted(&mut self, summary: &Summary) {
        let _ = summary;
    }

    /// The run is complete and its final model written.
    fn finished(&mut self, summary: &Summary) {
        let _ = summary;
    }
}

/// Nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// One optimiser step.
#[derive(Clone, Debug)]
pub struct StepReport<'a> {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Mean cross-entropy over the step's target tokens, in nats, before the update.
    pub loss: f64,
    /// Mean KL divergence from the teacher, where there is one.
    pub kl: Option<f64>,
    /// Mean magnitude of the down projections' inputs, where it is regularised.
    pub l1: Option<f64>,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens trained on since the run began, padding included.
    pub tokens_seen: u64,
    /// Tokens of this step per second of it.
    pub tokens_per_second: f64,
    /// Densities during this step; only at logged steps.
    pub densities: Option<&'a DensityTap>,
}

/// The validation split under the current weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    /// Mean cross-entropy over its target tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Target tokens.
    pub tokens: u64,
    /// For each layer the neurons that no token activated, where asked for.
    pub dead_neurons: Option<Vec<usize>>,
}
