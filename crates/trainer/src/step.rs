//! The gradient of one optimiser step: micro-batches weighted by their target tokens, so
//! that accumulation gives what one large batch would.

use relufy_data::Batch;
use relufy_model::{
    Decoder, Gradients, Objective, OnFinal, ParamId, Recompute, StepLoss, Tap, TeacherOutput,
};

use crate::Result;
use crate::config::Regularise;
use crate::schedule::l1_factor;
use crate::validation::tokens;

/// For whoever steps when all gradients are known.
pub fn later(_: &Gradients, _: &[ParamId]) -> relufy_model::Result<()> {
    Ok(())
}

/// What a step minimises besides the cross-entropy.
#[derive(Default)]
pub struct Terms {
    /// The teacher.
    pub teacher: Option<Teacher>,
    /// The activation regularisation.
    pub regularise: Option<Regularise>,
    /// What is computed again in the backward pass.
    pub recompute: Recompute,
}

/// A model to learn from.
pub struct Teacher {
    /// Its weights.
    pub decoder: Decoder,
    /// Share of its term in the loss.
    pub weight: f64,
    /// Flattens both distributions.
    pub temperature: f64,
}

/// The losses of a step, each averaged over all its target tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepLosses {
    /// Cross-entropy in nats.
    pub loss: f64,
    /// KL divergence from the teacher.
    pub kl: f64,
    /// Mean magnitude of the down projections' inputs.
    pub l1: f64,
    /// Target tokens.
    pub targets: usize,
}

/// Computes the gradient of step `step` (from 0) over its micro-batches. `None` if `stop`
/// said so in between; the gradients are then incomplete. `on_final` hears of gradients that their
/// micro-batch does not write again.
///
/// # Errors
/// From the model.
#[allow(clippy::too_many_arguments, reason = "a step's data, terms, results and watchers")]
pub fn gradients(
    decoder: &Decoder,
    batches: &[Batch],
    terms: &Terms,
    step: u64,
    gradients: &mut Gradients,
    tap: &mut dyn Tap,
    stop: &dyn Fn() -> bool,
    on_final: OnFinal<'_>,
) -> Result<Option<StepLosses>> {
    let targets: usize = batches.iter().map(Batch::targets_counted).sum();
    let all: usize = batches.iter().map(|batch| batch.ids.len()).sum();
    let lambda = terms.regularise.as_ref().map(|regularise| l1_factor(regularise, step) as f32);
    let objective = Objective {
        scale: 1.0 / targets.max(1) as f32,
        recompute: terms.recompute,
        teacher: terms.teacher.as_ref().map(|teacher| TeacherOutput {
            decoder: &teacher.decoder,
            temperature: teacher.temperature as f32,
            weight: teacher.weight as f32,
        }),
        l1: lambda,
    };
    let mut sums = StepLoss::default();
    gradients.begin_step();
    for batch in batches {
        if stop() {
            return Ok(None);
        }
        let tokens = tokens(batch);
        let targets = &batch.targets;
        sums += decoder
            .forward_backward_with(&tokens, targets, &objective, gradients, tap, on_final)?;
    }
    let each = targets.max(1) as f64;
    Ok(Some(StepLosses {
        loss: sums.sum / each,
        kl: sums.kl_sum / each,
        l1: sums.l1_sum / all.max(1) as f64,
        targets,
    }))
}
