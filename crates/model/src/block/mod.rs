//! One transformer block, forward and backward side by side.
//!
//! ```text
//! sequential:  x -> norm -> attention -> (+x) -> norm -> MLP -> (+)
//! parallel:    x -> norm -> attention ----------------------\
//!              x -> norm (or the same) -> MLP -> (+ x + attention)
//! ```

mod attention;
mod mlp;

use std::cell::OnceCell;

use candle_core::Tensor;
use relufy_ops::buffer::Accum;
use relufy_ops::linear;
use relufy_ops::norm::{self, Norm, NormStats};
use relufy_ops::pointwise::{self, Pointwise};
use relufy_ops::rope::RopeTable;
use relufy_spec::Site;

use crate::decoder::add_into;
use crate::layer::Joins;
use crate::tap::{Want, show};
use crate::{
    Decoder, Error, Gradients, KvRows, LayerParam, NoTap, ParamId, Point, Recompute, Result, Side,
    Tap, Tokens,
};
use attention::SavedAttention;
use mlp::SavedMlp;

/// What is kept of a block between forward and backward.
pub(crate) enum Saved {
    /// Only what entered it; the rest is computed again.
    Input(Tensor),
    /// Everything.
    All(Box<SavedBlock>),
}

/// What the backward pass reads; what `None` stands for is computed again there.
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

impl SavedBlock {
    /// What a norm read, and its statistics.
    fn of_norm(&self, n: usize, which: Which) -> Result<(&Tensor, &NormStats)> {
        let (x, stats) = match which {
            Which::Attention => (&self.x, Some(&self.attention_stats)),
            Which::Mlp => (&self.mid, self.mlp_stats.as_ref()),
        };
        Ok((x, stats.ok_or_else(|| Error::Invalid(format!("layer {n} has one norm")))?))
    }
}

/// The input of a branch, computed again.
type Again<'a> = &'a dyn Fn() -> Result<Tensor>;

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

impl Saved {
    /// What `recompute` keeps of a block that read `x`.
    pub fn keep(x: Tensor, mut saved: SavedBlock, recompute: Recompute) -> Saved {
        match recompute {
            Recompute::Block => return Saved::Input(x),
            Recompute::Inputs => {
                saved.attention.forget_inputs();
                saved.mlp.forget_inputs();
            }
            Recompute::None => {}
        }
        Saved::All(Box::new(saved))
    }
}

impl Decoder {
    /// One block. `x` is `[n_tokens, hidden]`.
    pub(crate) fn block(
        &self,
        n: usize,
        x: Tensor,
        tokens: &Tokens,
        rope: Option<&RopeTable>,
        cache: Option<&KvRows>,
        tap: &mut dyn Tap,
    ) -> Result<(Tensor, SavedBlock)> {
        let plan = &self.layers[n];
        let (input, attention_stats) = self.norm_site(n, Which::Attention, &x, tap)?;
        // Each branch is added to the residual stream as it leaves its last product.
        let (attended, attention) =
            self.attention(n, &x, input.clone(), tokens, rope, cache, tap)?;
        let (mid, out, mlp_stats, mlp) = match plan.joins {
            Joins::Sequential => {
                let (input, stats) = self.norm_site(n, Which::Mlp, &attended, tap)?;
                let (out, mlp) = self.mlp(n, &attended, input, tap)?;
                (attended, out, Some(stats), mlp)
            }
            Joins::ParallelShared => {
                // One tensor enters both branches: the tap sees it at both sites.
                show(tap, Point { layer: n, site: Site::UpIn, side: Side::At }, &input)?;
                let (out, mlp) = self.mlp(n, &attended, input, tap)?;
                (x.clone(), out, None, mlp)
            }
            Joins::ParallelSeparate => {
                let (input, stats) = self.norm_site(n, Which::Mlp, &x, tap)?;
                let (out, mlp) = self.mlp(n, &attended, input, tap)?;
                (x.clone(), out, Some(stats), mlp)
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
                let input = || self.norm_again(n, Which::Mlp, &saved);
                if let Some(d) = self.mlp_backward(n, &saved.mlp, &input, dx, second_norm, pass)? {
                    self.norm_backward(n, Which::Mlp, &saved, &d, dx, pass)?;
                }
                let (kept, input) =
                    (&saved.attention, || self.norm_again(n, Which::Attention, &saved));
                if attention
                    && let Some(d) =
                        self.attention_backward(n, kept, &input, dx, first_norm, pass)?
                {
                    self.norm_backward(n, Which::Attention, &saved, &d, dx, pass)?;
                }
            }
            // Both branches read the output's gradient, so both run before a norm adds to it.
            Joins::ParallelShared => {
                let again = OnceCell::new();
                let input = || match again.get() {
                    Some(input) => Ok(Tensor::clone(input)),
                    None => {
                        let input = self.norm_again(n, Which::Attention, &saved)?;
                        Ok(again.get_or_init(|| input).clone())
                    }
                };
                let mlp = self.mlp_backward(n, &saved.mlp, &input, dx, first_norm, pass)?;
                let kept = &saved.attention;
                let attention = self.attention_backward(n, kept, &input, dx, first_norm, pass)?;
                if let (Some(mlp), Some(attention)) = (mlp, attention) {
                    let both = add_into(&mlp, attention)?;
                    self.norm_backward(n, Which::Attention, &saved, &both, dx, pass)?;
                }
            }
            Joins::ParallelSeparate => {
                let second_norm = below || trained(&[MlpNorm, MlpNormBias]);
                let input = || self.norm_again(n, Which::Mlp, &saved);
                let mlp = self.mlp_backward(n, &saved.mlp, &input, dx, second_norm, pass)?;
                let (kept, input) =
                    (&saved.attention, || self.norm_again(n, Which::Attention, &saved));
                let attention = self.attention_backward(n, kept, &input, dx, first_norm, pass)?;
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
        let (x, stats) = saved.of_norm(n, which)?;
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

    /// What the norm and its site's operation gave in the forward pass, computed again.
    fn norm_again(&self, n: usize, which: Which, saved: &SavedBlock) -> Result<Tensor> {
        let (_, op) = self.site_of(n, which);
        let (x, stats) = saved.of_norm(n, which)?;
        Ok(norm::again(x, &self.block_norm(n, which, op)?, stats)?)
    }

    /// A projection back to the residual stream, added to it.
    fn linear_onto(
        &self,
        n: usize,
        residual: &Tensor,
        (weight, bias): (LayerParam, LayerParam),
        x: &Tensor,
    ) -> Result<Tensor> {
        let (weight, bias) = (self.weight(n, weight)?, self.layer_param(n, bias));
        Ok(linear::forward_onto(residual, x, weight, bias)?)
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

    fn block_norm(&self, n: usize, which: Which, post: Pointwise) -> Result<Norm<'_>> {
        let (weight, bias) = norm_ids(n, which);
        self.norm(self.layers[n].norm, weight, bias, post)
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
