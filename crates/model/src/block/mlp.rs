//! The feed-forward branch of a block, and the way back.

use candle_core::Tensor;
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::{gated, linear};
use relufy_spec::Site;

use super::{BackwardPass, apply};
use crate::tap::{Want, show};
use crate::{Decoder, LayerParam, ParamId, Point, Result, Side, Tap};

/// What the MLP's backward pass reads.
pub(super) struct SavedMlp {
    input: Tensor,
    /// Output of the up projection: `[gate | up]` where there is a gate.
    up: Tensor,
    /// The activation's output, before the site's operation.
    activated: Tensor,
    /// What the down projection reads.
    down_input: Tensor,
}

impl Decoder {
    /// The feed-forward network: `[n_tokens, hidden]` to the same.
    pub(super) fn mlp(
        &self,
        n: usize,
        input: Tensor,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, SavedMlp)> {
        let plan = &self.layers[n];
        let up = self.linear(n, LayerParam::Up, LayerParam::UpBias, &input)?;
        let point = |side| Point { layer: n, site: Site::DownIn, side };
        if !matches!(tap.want(point(Side::Before)), Want::Nothing) {
            let pre =
                if plan.gated { up.narrow(1, 0, plan.ffn)?.contiguous()? } else { up.clone() };
            show(tap, point(Side::Before), &pre)?;
        }
        let activated = if plan.gated {
            gated::forward(&up, plan.activation)?
        } else {
            pointwise::forward(&up, plan.activation)?
        };
        let down_input = apply(&activated, plan.down_in)?;
        show(tap, point(Side::At), &down_input)?;
        let out = self.linear(n, LayerParam::Down, LayerParam::DownBias, &down_input)?;
        Ok((out, SavedMlp { input, up, activated, down_input }))
    }

    /// The gradients of the MLP's weights, and of its input where that is wanted.
    pub(super) fn mlp_backward(
        &self,
        n: usize,
        saved: &SavedMlp,
        dy: &Tensor,
        wants_input: bool,
        pass: &mut BackwardPass<'_>,
    ) -> Result<Option<Tensor>> {
        let plan = &self.layers[n];
        use LayerParam::*;
        self.linear_backward(n, Down, DownBias, &saved.down_input, dy, pass)?;
        let trained = [Up, UpBias].iter().any(|p| pass.gradients.wants(ParamId::Layer(n, *p)));
        if !wants_input && !trained {
            return Ok(None);
        }
        let d = linear::backward_input(dy, self.weight(n, Down)?, None)?;
        if let Some(l1) = &mut pass.l1 {
            let per_neuron = l1.lambda / plan.ffn as f32;
            l1.sum += gated::add_l1_gradient(&saved.down_input, per_neuron, &d)? / plan.ffn as f64;
        }
        if plan.down_in != Pointwise::Identity {
            pointwise::backward_in_place(&saved.activated, plan.down_in, &d)?;
        }
        let d_up = if plan.gated {
            gated::backward(&saved.up, plan.activation, &d)?
        } else {
            pointwise::backward_in_place(&saved.up, plan.activation, &d)?;
            d
        };
        self.linear_backward(n, Up, UpBias, &saved.input, &d_up, pass)?;
        if !wants_input {
            return Ok(None);
        }
        Ok(Some(linear::backward_input(&d_up, self.weight(n, Up)?, None)?))
    }
}
