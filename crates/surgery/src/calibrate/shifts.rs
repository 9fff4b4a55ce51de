//! One shift a layer, such that each layer's ReLU drops the same share of its
//! pre-activations (paper section 5.3, which sets one shift for all layers by eye).
//!
//! A shift changes what later layers see, so that shifts read off the unshifted model
//! miss their aim. Measuring again with the shifts in place, and correcting, settles layer
//! after layer: layer `n` is right after at most `n + 1` rounds, in practice after 2 or 3.

use candle_core::Device;
use relufy_data::Progress;
use relufy_model::{Checkpoint, Decoder};
use relufy_spec::{Activation, PerLayer, ReluPlan};
use serde::Serialize;

use super::{Options, calibrate, check_share};
use crate::{Error, Result};

/// The shifts found, and what they do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shifts {
    /// One a layer, for `max(x - shift, 0)`; may be negative.
    pub shifts: Vec<f64>,
    /// The share of zeros that each layer's down projection reads with them, counted.
    pub sparsity: Vec<f64>,
    /// Rounds of measuring and correcting.
    pub rounds: usize,
}

/// A sparsity this near to the wanted one is near enough.
const NEAR: f64 = 0.005;

/// Corrections beyond this number follow noise.
const MAX_ROUNDS: usize = 6;

/// Finds for each layer the shift with which its ReLU drops a share `quantile` of the
/// pre-activations, in the model that `plan` makes of `checkpoint`. The activation that the
/// plan names does not matter.
///
/// # Errors
/// A share outside of 0 to 1; a model or plan that does not load; as [`calibrate`].
pub fn fit_shifts(
    checkpoint: &Checkpoint,
    plan: &ReluPlan,
    quantile: f64,
    sequences: &[Vec<u32>],
    options: &Options,
    progress: &dyn Progress,
) -> Result<Shifts> {
    check_share(quantile)?;
    let options = Options { quantiles: vec![], sparsities: vec![quantile], ..options.clone() };
    let mut decoder = checkpoint.load_with(&Device::Cpu, &with_activation(plan, None))?;
    let mut shifts: Option<Vec<f64>> = None;
    for round in 1.. {
        let measured = calibrate(&decoder, sequences, &options, progress)?;
        let sparsity: Vec<f64> =
            measured.layers.iter().map(|layer| 1.0 - layer.down.density).collect();
        let near = sparsity.iter().all(|found| (found - quantile).abs() <= NEAR);
        match shifts {
            Some(shifts) if near || round > MAX_ROUNDS => {
                return Ok(Shifts { shifts, sparsity, rounds: round - 1 });
            }
            _ => {}
        }
        let corrected: Vec<f64> = measured
            .layers
            .iter()
            .filter_map(|layer| layer.down.shifts.first().map(|found| found.value))
            .collect();
        let shifted = with_activation(plan, Some(&corrected));
        let spec = shifted.apply(&checkpoint.config().spec)?;
        decoder = Decoder::new(spec, decoder.params().clone())?;
        shifts = Some(corrected);
    }
    Err(Error::Calibration { why: "no round was run".to_owned() })
}

/// `plan` with a ReLU as activation: plain, or shifted layer by layer.
fn with_activation(plan: &ReluPlan, shifts: Option<&[f64]>) -> ReluPlan {
    let activation = match shifts {
        None => PerLayer::All(Activation::Relu),
        Some(shifts) => PerLayer::Each(
            shifts.iter().map(|shift| Activation::ShiftedRelu { shift: *shift }).collect(),
        ),
    };
    ReluPlan { activation: Some(activation), ..plan.clone() }
}
