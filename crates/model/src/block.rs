//! One transformer block, forward and backward side by side.
//!
//! ```text
//! sequential:  x -> norm -> attention -> (+x) -> norm -> MLP -> (+)
//! parallel:    x -> norm -> attention ----------------------\
//!              x -> norm (or the same) -> MLP -> (+ x + attention)
//! ```

use candle_core::Tensor;
use relufy_ops::attention::{self, Cols, Qkv};
use relufy_ops::buffer::Accum;
use relufy_ops::norm::{self, Norm, NormStats};
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::rope::{self, RopeTable};
use relufy_ops::{gated, linear};
use relufy_spec::{Position, Site};

use crate::decoder::add_into;
use crate::layer::{Joins, LayerPlan, NormPlan, rope_pairs};
use crate::tap::{Want, show};
use crate::{
    Decoder, Error, Gradients, KvCache, LayerParam, NoTap, ParamId, Point, Result, Side, Tap,
    Tokens,
};

/// What is kept of a block between forward and backward.
pub(crate) enum Saved {
    /// Only what entered it; the rest is computed again.
    Input(Tensor),
    /// Everything.
    All(Box<SavedBlock>),
}

/// Every activation that the backward pass reads.
pub(crate) struct SavedBlock {
    /// What the first norm reads.
    x: Tensor,
    /// What the second norm reads; `x` in a parallel block.
    mid: Tensor,
    attention_stats: NormStats,
    /// `None` where one norm is shared.
    mlp_stats: Option<NormStats>,
    attention: SavedAttention,
    mlp: SavedMlp,
}

struct SavedAttention {
    input: Tensor,
    /// After norms and rotation of queries and keys.
    qkv: Tensor,
    qk_stats: Option<(NormStats, NormStats)>,
    core: attention::Saved,
    /// What the output projection reads.
    o_input: Tensor,
}

struct SavedMlp {
    input: Tensor,
    /// Output of the up projection: `[gate | up]` where there is a gate.
    up: Tensor,
    /// The activation's output, before the site's operation.
    activated: Tensor,
    /// What the down projection reads.
    down_input: Tensor,
}

/// What a backward pass carries from block to block.
pub(crate) struct BackwardPass<'a> {
    pub tokens: &'a Tokens,
    pub rope: Option<&'a RopeTable>,
    pub gradients: &'a Gradients,
    /// Gradient of the L1 penalty per element of what `down` reads, if there is one.
    pub l1: Option<L1>,
}

/// The activation penalty of one pass.
#[derive(Clone, Copy, Default)]
pub(crate) struct L1 {
    /// `lambda * scale`, divided by layers.
    pub lambda: f32,
    /// The sum over layers of `mean over neurons, sum over tokens` of `|h|`.
    pub sum: f64,
}

/// The two norms of a block.
#[derive(Clone, Copy)]
enum Which {
    Attention,
    Mlp,
}

impl Decoder {
    /// One block. `x` is `[n_tokens, hidden]`.
    pub(crate) fn block(
        &self,
        n: usize,
        x: Tensor,
        tokens: &Tokens,
        rope: Option<&RopeTable>,
        cache: Option<&KvCache>,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, SavedBlock)> {
        let plan = &self.layers[n];
        let (input, attention_stats) = self.norm_site(n, Which::Attention, &x, tap)?;
        let (attended, attention) = self.attention(n, input.clone(), tokens, rope, cache, tap)?;
        let (mid, out, mlp_stats, mlp) = match plan.joins {
            Joins::Sequential => {
                let mid = add_into(&x, attended)?;
                let (input, stats) = self.norm_site(n, Which::Mlp, &mid, tap)?;
                let (out, mlp) = self.mlp(n, input, tap)?;
                let out = add_into(&mid, out)?;
                (mid, out, Some(stats), mlp)
            }
            Joins::ParallelShared => {
                // One tensor enters both branches: the tap sees it at both sites.
                show(tap, Point { layer: n, site: Site::UpIn, side: Side::At }, &input)?;
                let (out, mlp) = self.mlp(n, input, tap)?;
                (x.clone(), add_into(&x, add_into(&attended, out)?)?, None, mlp)
            }
            Joins::ParallelSeparate => {
                let (input, stats) = self.norm_site(n, Which::Mlp, &x, tap)?;
                let (out, mlp) = self.mlp(n, input, tap)?;
                (x.clone(), add_into(&x, add_into(&attended, out)?)?, Some(stats), mlp)
            }
        };
        Ok((out, SavedBlock { x, mid, attention_stats, mlp_stats, attention, mlp }))
    }

    /// The backward pass of one block. `dx` holds the gradient of the block's output and is
    /// turned, in place, into that of its input. `below` says whether anything in front of
    /// this block is trained.
    pub(crate) fn block_backward(
        &self,
        n: usize,
        saved: Saved,
        dx: &Tensor,
        below: bool,
        pass: &mut BackwardPass<'_>,
    ) -> Result<()> {
        let saved = match saved {
            Saved::All(saved) => saved,
            Saved::Input(x) => {
                Box::new(self.block(n, x, pass.tokens, pass.rope, None, &mut NoTap)?.1)
            }
        };
        let trained = |params: &[LayerParam]| {
            params.iter().any(|param| pass.gradients.wants(ParamId::Layer(n, *param)))
        };
        use LayerParam::*;
        let first_norm = below || trained(&[AttnNorm, AttnNormBias]);
        let attention = first_norm || trained(&[Qkv, QkvBias, QNorm, KNorm, O, OBias]);
        match self.layers[n].joins {
            Joins::Sequential => {
                let second_norm = attention || trained(&[MlpNorm, MlpNormBias]);
                if let Some(d) = self.mlp_backward(n, &saved.mlp, dx, second_norm, pass)? {
                    self.norm_backward(n, Which::Mlp, &saved, &d, dx, pass)?;
                }
                if attention
                    && let Some(d) =
                        self.attention_backward(n, &saved.attention, dx, first_norm, pass)?
                {
                    self.norm_backward(n, Which::Attention, &saved, &d, dx, pass)?;
                }
            }
            // Both branches read the output's gradient, so both run before a norm adds to it.
            Joins::ParallelShared => {
                let mlp = self.mlp_backward(n, &saved.mlp, dx, first_norm, pass)?;
                let attention =
                    self.attention_backward(n, &saved.attention, dx, first_norm, pass)?;
                if let (Some(mlp), Some(attention)) = (mlp, attention) {
                    let both = add_into(&mlp, attention)?;
                    self.norm_backward(n, Which::Attention, &saved, &both, dx, pass)?;
                }
            }
            Joins::ParallelSeparate => {
                let second_norm = below || trained(&[MlpNorm, MlpNormBias]);
                let mlp = self.mlp_backward(n, &saved.mlp, dx, second_norm, pass)?;
                let attention =
                    self.attention_backward(n, &saved.attention, dx, first_norm, pass)?;
                if let Some(d) = mlp {
                    self.norm_backward(n, Which::Mlp, &saved, &d, dx, pass)?;
                }
                if let Some(d) = attention {
                    self.norm_backward(n, Which::Attention, &saved, &d, dx, pass)?;
                }
            }
        }
        Ok(())
    }

    /// A norm and the operation at its site, in one kernel unless the tap wants to see between.
    fn norm_site(
        &self,
        n: usize,
        which: Which,
        x: &Tensor,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, NormStats)> {
        let (site, op) = self.site_of(n, which);
        let before = Point { layer: n, site, side: Side::Before };
        let (out, stats) = if matches!(tap.want(before), Want::Nothing) {
            norm::forward(x, &self.block_norm(n, which, op)?)?
        } else {
            let (plain, stats) =
                norm::forward(x, &self.block_norm(n, which, Pointwise::Identity)?)?;
            show(tap, before, &plain)?;
            (apply(&plain, op)?, stats)
        };
        show(tap, Point { layer: n, site, side: Side::At }, &out)?;
        Ok((out, stats))
    }

    fn norm_backward(
        &self,
        n: usize,
        which: Which,
        saved: &SavedBlock,
        dy: &Tensor,
        dx: &Tensor,
        pass: &BackwardPass<'_>,
    ) -> Result<()> {
        let (_, op) = self.site_of(n, which);
        let (x, stats) = match which {
            Which::Attention => (&saved.x, Some(&saved.attention_stats)),
            Which::Mlp => (&saved.mid, saved.mlp_stats.as_ref()),
        };
        let stats = stats.ok_or_else(|| Error::Invalid(format!("layer {n} has one norm")))?;
        let (weight, bias) = norm_ids(n, which);
        let (weight, bias) = (pass.gradients.target(weight), pass.gradients.target(bias));
        norm::backward(
            x,
            &self.block_norm(n, which, op)?,
            stats,
            dy,
            (dx, Accum::Add),
            weight.as_ref().map(|target| (target.tensor, target.accum)),
            bias.as_ref().map(|target| (target.tensor, target.accum)),
        )?;
        Ok(())
    }

    /// Projections, rotation and softmax: `[n_tokens, hidden]` to the same.
    fn attention(
        &self,
        n: usize,
        input: Tensor,
        tokens: &Tokens,
        rope: Option<&RopeTable>,
        cache: Option<&KvCache>,
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
        let out = self.linear(n, LayerParam::O, LayerParam::OBias, &o_input)?;
        Ok((out, SavedAttention { input, qkv, qk_stats, core, o_input }))
    }

    fn attention_backward(
        &self,
        n: usize,
        saved: &SavedAttention,
        dy: &Tensor,
        wants_input: bool,
        pass: &BackwardPass<'_>,
    ) -> Result<Option<Tensor>> {
        let plan = &self.layers[n];
        self.linear_backward(n, LayerParam::O, LayerParam::OBias, &saved.o_input, dy, pass)?;
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
        self.linear_backward(n, Qkv, QkvBias, &saved.input, &d_qkv, pass)?;
        if !wants_input {
            return Ok(None);
        }
        Ok(Some(linear::backward_input(&d_qkv, self.weight(n, Qkv)?, None)?))
    }

    /// The feed-forward network: `[n_tokens, hidden]` to the same.
    fn mlp(&self, n: usize, input: Tensor, tap: &mut dyn Tap) -> Result<(Tensor, SavedMlp)> {
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

    fn mlp_backward(
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

    fn linear(&self, n: usize, weight: LayerParam, bias: LayerParam, x: &Tensor) -> Result<Tensor> {
        Ok(linear::forward(x, self.weight(n, weight)?, self.layer_param(n, bias))?)
    }

    /// Gradients of a projection's weight and bias, where they are trained.
    fn linear_backward(
        &self,
        n: usize,
        weight: LayerParam,
        bias: LayerParam,
        x: &Tensor,
        dy: &Tensor,
        pass: &BackwardPass<'_>,
    ) -> Result<()> {
        if let Some(target) = pass.gradients.target(ParamId::Layer(n, weight)) {
            target.for_rows(|rows, dest| linear::backward_weight(dy, x, rows, dest))?;
        }
        if let Some(target) = pass.gradients.target(ParamId::Layer(n, bias)) {
            target.for_rows(|rows, dest| linear::backward_bias(dy, rows, dest))?;
        }
        Ok(())
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

    fn block_norm(&self, n: usize, which: Which, post: Pointwise) -> Result<Norm<'_>> {
        let (weight, bias) = norm_ids(n, which);
        self.norm(self.layers[n].norm, weight, bias, post)
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

    fn site_of(&self, n: usize, which: Which) -> (Site, Pointwise) {
        match which {
            Which::Attention => (Site::QkvIn, self.layers[n].qkv_in),
            Which::Mlp => (Site::UpIn, self.layers[n].up_in),
        }
    }

    fn weight(&self, n: usize, param: LayerParam) -> Result<&Tensor> {
        self.param(ParamId::Layer(n, param))
    }
}

fn norm_ids(n: usize, which: Which) -> (ParamId, ParamId) {
    match which {
        Which::Attention => {
            (ParamId::Layer(n, LayerParam::AttnNorm), ParamId::Layer(n, LayerParam::AttnNormBias))
        }
        Which::Mlp => {
            (ParamId::Layer(n, LayerParam::MlpNorm), ParamId::Layer(n, LayerParam::MlpNormBias))
        }
    }
}

/// A site's operation; nothing is copied where there is none.
fn apply(x: &Tensor, op: Pointwise) -> Result<Tensor> {
    match op {
        Pointwise::Identity => Ok(x.clone()),
        op => Ok(pointwise::forward(x, op)?),
    }
}
