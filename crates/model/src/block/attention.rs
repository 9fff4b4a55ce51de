//! The attention branch of a block: projections, rotation, softmax, and the way back.

use candle_core::Tensor;
use relufy_ops::attention::{self, Cols, Qkv};
use relufy_ops::linear;
use relufy_ops::norm::{self, Norm, NormStats};
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::rope::{self, RopeTable};
use relufy_spec::{Position, Site};

use super::{Again, BackwardPass, apply};
use crate::layer::{LayerPlan, NormPlan, rope_pairs};
use crate::tap::show;
use crate::{Decoder, KvRows, LayerParam, ParamId, Point, Result, Side, Tap, Tokens};

/// What attention's backward pass reads.
pub(super) struct SavedAttention {
    /// What the projections read; `None` where it is computed again.
    input: Option<Tensor>,
    /// After norms and rotation of queries and keys.
    qkv: Tensor,
    qk_stats: Option<(NormStats, NormStats)>,
    core: attention::Saved,
    /// What the output projection reads; `None` where it is computed again.
    o_input: Option<Tensor>,
}

impl SavedAttention {
    /// Lets go of what the block can compute again at little cost.
    pub(super) fn forget_inputs(&mut self) {
        self.input = None;
        self.o_input = None;
    }
}

impl Decoder {
    /// Projections, rotation and softmax, added to `residual`: all `[n_tokens, hidden]`.
    #[allow(clippy::too_many_arguments, reason = "a branch, its block and its pass")]
    pub(super) fn attention(
        &self,
        n: usize,
        residual: &Tensor,
        input: Tensor,
        tokens: &Tokens,
        rope: Option<&RopeTable>,
        cache: Option<&KvRows>,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, SavedAttention)> {
        let plan = &self.layers[n];
        let qkv = self.linear(n, LayerParam::Qkv, LayerParam::QkvBias, &input)?;
        let qk_stats = match plan.qk_norm {
            None => None,
            Some(norm) => {
                let dim = plan.heads.head_dim;
                let (q, k) = (0..plan.q_width, plan.q_width..plan.q_width + plan.kv_width);
                let (q_norm, k_norm) = (LayerParam::QNorm, LayerParam::KNorm);
                Some((
                    norm::forward_heads(&qkv, q, dim, &self.head_norm(norm, n, q_norm)?)?,
                    norm::forward_heads(&qkv, k, dim, &self.head_norm(norm, n, k_norm)?)?,
                ))
            }
        };
        self.rotate(plan, &qkv, rope, &tokens.positions, false)?;
        let core = match cache {
            None => {
                attention::forward(&Qkv::packed(&qkv, &plan.heads), &tokens.segments, &plan.heads)?
            }
            Some(cache) => {
                let (keys, values) = cache.store(n, &qkv)?;
                let whole = |tensor| Cols { tensor, start_col: 0 };
                let seen = Qkv { q: whole(&qkv), k: whole(keys), v: whole(values) };
                attention::forward(&seen, &tokens.segments, &plan.heads)?
            }
        };
        let point = |side| Point { layer: n, site: Site::OIn, side };
        show(tap, point(Side::Before), &core.out)?;
        let o_input = apply(&core.out, plan.o_in)?;
        show(tap, point(Side::At), &o_input)?;
        let out = self.linear_onto(n, residual, (LayerParam::O, LayerParam::OBias), &o_input)?;
        let (input, o_input) = (Some(input), Some(o_input));
        Ok((out, SavedAttention { input, qkv, qk_stats, core, o_input }))
    }

    /// The gradients of attention's weights, and of its input where that is wanted.
    pub(super) fn attention_backward(
        &self,
        n: usize,
        saved: &SavedAttention,
        input: Again<'_>,
        dy: &Tensor,
        wants_input: bool,
        pass: &BackwardPass<'_>,
    ) -> Result<Option<Tensor>> {
        let plan = &self.layers[n];
        let o_input = match &saved.o_input {
            Some(kept) => kept.clone(),
            None => apply(&saved.core.out, plan.o_in)?,
        };
        self.linear_backward(n, LayerParam::O, LayerParam::OBias, &o_input, dy, pass)?;
        drop(o_input);
        use LayerParam::*;
        let projections = [Qkv, QkvBias, QNorm, KNorm];
        let trained = projections.iter().any(|p| pass.gradients.wants(ParamId::Layer(n, *p)));
        if !wants_input && !trained {
            return Ok(None);
        }
        let d_out = linear::backward_input(dy, self.weight(n, LayerParam::O)?, None)?;
        if plan.o_in != Pointwise::Identity {
            pointwise::backward_in_place(&saved.core.out, plan.o_in, &d_out)?;
        }
        let packed = attention::Qkv::packed(&saved.qkv, &plan.heads);
        let d_qkv =
            attention::backward(&packed, &pass.tokens.segments, &plan.heads, &saved.core, &d_out)?;
        self.rotate(plan, &d_qkv, pass.rope, &pass.tokens.positions, true)?;
        if let (Some(norm), Some((q_stats, k_stats))) = (plan.qk_norm, &saved.qk_stats) {
            let dim = plan.heads.head_dim;
            let q = 0..plan.q_width;
            let k = plan.q_width..plan.q_width + plan.kv_width;
            for (cols, param, stats) in [(q, QNorm, q_stats), (k, KNorm, k_stats)] {
                let target = pass.gradients.target(ParamId::Layer(n, param));
                let dest = target.as_ref().map(|target| (target.tensor, target.accum));
                let norm = self.head_norm(norm, n, param)?;
                norm::backward_heads(&d_qkv, cols, dim, &norm, stats, dest)?;
            }
        }
        let input = saved.input.clone().map_or_else(input, Ok)?;
        self.linear_backward(n, Qkv, QkvBias, &input, &d_qkv, pass)?;
        if !wants_input {
            return Ok(None);
        }
        Ok(Some(linear::backward_input(&d_qkv, self.weight(n, Qkv)?, None)?))
    }

    /// Turns queries and keys by their positions, in place; `inverse` is the backward pass.
    fn rotate(
        &self,
        plan: &LayerPlan,
        qkv: &Tensor,
        table: Option<&RopeTable>,
        positions: &[u32],
        inverse: bool,
    ) -> Result<()> {
        if let (Position::Rope { layout, .. }, Some(table)) = (&self.spec().position, table) {
            let cols = 0..plan.q_width + plan.kv_width;
            let pairs = rope_pairs(*layout);
            rope::apply(qkv, cols, plan.heads.head_dim, table, pairs, positions, inverse)?;
        }
        Ok(())
    }

    /// The norm over each head of queries or keys; it has no bias.
    fn head_norm(&self, plan: NormPlan, n: usize, param: LayerParam) -> Result<Norm<'_>> {
        Ok(Norm {
            kind: plan.kind,
            eps: plan.eps,
            weight: self.weight(n, param)?,
            bias: None,
            post: Pointwise::Identity,
        })
    }
}
