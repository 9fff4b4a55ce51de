//! The feed-forward branch of a block, and the way back.

use candle_core::Tensor;
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::{gated, linear};
use relufy_spec::Site;

use super::{Again, BackwardPass, apply};
use crate::layer::LayerPlan;
use crate::tap::{Want, show};
use crate::{Decoder, LayerParam, ParamId, Point, Result, Side, Tap};

/// What the MLP's backward pass reads; what is `None` is computed again, or was never there.
pub(super) struct SavedMlp {
    input: Option<Tensor>,
    /// Output of the up projection: `[gate | up]` where there is a gate. `None` where ReLU came
    /// with the product: its output says as much about the way back.
    up: Option<Tensor>,
    /// The activation's output, before the site's operation.
    activated: Option<Tensor>,
    /// What the down projection reads.
    down_input: Option<Tensor>,
}

impl SavedMlp {
    /// Lets go of what the block can compute again at little cost.
    pub(super) fn forget_inputs(&mut self) {
        self.input = None;
        if self.up.is_some() {
            self.activated = None;
            self.down_input = None;
        }
    }
}

impl Decoder {
    /// The feed-forward network, added to `residual`: all `[n_tokens, hidden]`.
    pub(super) fn mlp(
        &self,
        n: usize,
        residual: &Tensor,
        input: Tensor,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, SavedMlp)> {
        let plan = &self.layers[n];
        let point = |side| Point { layer: n, site: Site::DownIn, side };
        let shown = !matches!(tap.want(point(Side::Before)), Want::Nothing);
        let (up, activated) = if !shown && plan.activates_with_product() {
            let (weight, bias) = (self.weight(n, LayerParam::Up)?, LayerParam::UpBias);
            (None, linear::forward_relu(&input, weight, self.layer_param(n, bias))?)
        } else {
            let up = self.linear(n, LayerParam::Up, LayerParam::UpBias, &input)?;
            if shown {
                let pre =
                    if plan.gated { up.narrow(1, 0, plan.ffn)?.contiguous()? } else { up.clone() };
                show(tap, point(Side::Before), &pre)?;
            }
            let activated = plan.activate(&up)?;
            (Some(up), activated)
        };
        let down_input = apply(&activated, plan.down_in)?;
        show(tap, point(Side::At), &down_input)?;
        let (weight, bias) = (LayerParam::Down, LayerParam::DownBias);
        let out = self.linear_onto(n, residual, (weight, bias), &down_input)?;
        let (activated, down_input) = (Some(activated), Some(down_input));
        Ok((out, SavedMlp { input: Some(input), up, activated, down_input }))
    }

    /// The gradients of the MLP's weights, and of its input where that is wanted.
    pub(super) fn mlp_backward(
        &self,
        n: usize,
        saved: &SavedMlp,
        input: Again<'_>,
        dy: &Tensor,
        wants_input: bool,
        pass: &mut BackwardPass<'_>,
    ) -> Result<Option<Tensor>> {
        let plan = &self.layers[n];
        use LayerParam::*;
        let trained = [Up, UpBias].iter().any(|p| pass.gradients.wants(ParamId::Layer(n, *p)));
        let goes_on = wants_input || trained;
        let d = match goes_on {
            true => Some(linear::backward_input(dy, self.weight(n, Down)?, None)?),
            false => None,
        };
        let d_up = match (&saved.up, &saved.down_input, d) {
            // Nothing is kept but the projection, and nothing else asks for what `down` reads: the
            // pass that makes the gradient makes it again.
            (Some(up), None, Some(d)) if plan.gated && plan.is_plain() && pass.l1.is_none() => {
                let (d_up, down_input) = gated::backward_with_output(up, plan.activation, &d)?;
                self.linear_backward(n, Down, DownBias, &down_input, dy, pass)?;
                Some(d_up)
            }
            (up, _, d) => {
                let activated = match (&saved.activated, up) {
                    (None, Some(up)) => Some(plan.activate(up)?),
                    (kept, _) => kept.clone(),
                };
                let down_input = match (&saved.down_input, &activated) {
                    (None, Some(activated)) => Some(apply(activated, plan.down_in)?),
                    (kept, _) => kept.clone(),
                };
                let (activated, down_input) = (needed(activated)?, needed(down_input)?);
                self.linear_backward(n, Down, DownBias, &down_input, dy, pass)?;
                match d {
                    None => None,
                    Some(d) => {
                        if let Some(l1) = &mut pass.l1 {
                            let each = l1.lambda / plan.ffn as f32;
                            let sum = gated::add_l1_gradient(&down_input, each, &d)?;
                            l1.sum += sum / plan.ffn as f64;
                        }
                        if plan.down_in != Pointwise::Identity {
                            pointwise::backward_in_place(&activated, plan.down_in, &d)?;
                        }
                        Some(plan.deactivate(up.as_ref(), &activated, d)?)
                    }
                }
            }
        };
        let Some(d_up) = d_up else { return Ok(None) };
        let input = saved.input.clone().map_or_else(input, Ok)?;
        self.linear_backward(n, Up, UpBias, &input, &d_up, pass)?;
        if !wants_input {
            return Ok(None);
        }
        Ok(Some(linear::backward_input(&d_up, self.weight(n, Up)?, None)?))
    }
}

impl LayerPlan {
    /// Whether the up projection applies the activation itself.
    fn activates_with_product(&self) -> bool {
        !self.gated && self.activation == Pointwise::Relu
    }

    /// Whether `down` reads the activation's output as it is.
    fn is_plain(&self) -> bool {
        self.down_in == Pointwise::Identity
    }

    /// The activation of what the up projection gave.
    fn activate(&self, up: &Tensor) -> Result<Tensor> {
        Ok(match self.gated {
            true => gated::forward(up, self.activation)?,
            false => pointwise::forward(up, self.activation)?,
        })
    }

    /// The way back through it, from the gradient of its output.
    fn deactivate(&self, up: Option<&Tensor>, activated: &Tensor, d: Tensor) -> Result<Tensor> {
        match up {
            Some(up) if self.gated => return Ok(gated::backward(up, self.activation, &d)?),
            // ReLU is positive where its input was.
            up => {
                pointwise::backward_in_place(up.unwrap_or(activated), self.activation, &d)?;
            }
        }
        Ok(d)
    }
}

/// A tensor that the forward pass left, or that was made again from what it left.
fn needed(t: Option<Tensor>) -> Result<Tensor> {
    t.ok_or_else(|| crate::Error::Invalid("an activation of the MLP is missing".to_owned()))
}
