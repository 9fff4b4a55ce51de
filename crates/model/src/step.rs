//! Loss and gradients of one batch: the forward walk, the loss, and the walk back.

use candle_core::Tensor;
use relufy_ops::buffer::{self, Accum};
use relufy_ops::loss::{self, Backward, Queued, Teacher};
use relufy_ops::{embedding, norm};
use relufy_spec::Position;
pub use relufy_spec::memory::Recompute;

use crate::block::{BackwardPass, L1};
use crate::decoder::{Walk, position_rows};
use crate::{Decoder, Error, Gradients, LayerParam, NoTap, ParamId, Result, Tap, Tokens};

/// What is minimised, and how.
#[derive(Clone, Copy, Default)]
pub struct Objective<'a> {
    /// Factor of the gradient: one over the target tokens of the whole optimizer step, so
    /// that accumulated batches weigh by their tokens.
    pub scale: f32,
    /// What is kept between forward and backward.
    pub recompute: Recompute,
    /// Distillation from another model.
    pub teacher: Option<TeacherOutput<'a>>,
    /// Penalty `lambda * mean |h|`, the mean over layers, neurons and tokens of what `down`
    /// reads (activation regularisation, as ProSparse's L1 on the gated product).
    pub l1: Option<f32>,
}

/// A model whose distribution is to be matched.
#[derive(Clone, Copy)]
pub struct TeacherOutput<'a> {
    /// The model; it reads the same tokens.
    pub decoder: &'a Decoder,
    /// Both distributions are softened by it.
    pub temperature: f32,
    /// The loss is `(1 - weight) * CE + weight * temperature^2 * KL(teacher || student)`.
    pub weight: f32,
}

/// The loss of one batch, in sums, so that batches add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepLoss {
    /// Cross-entropy, summed over target tokens.
    pub sum: f64,
    /// Target tokens.
    pub count: usize,
    /// KL divergence from the teacher, summed over target tokens.
    pub kl_sum: f64,
    /// Mean `|h|` over layers and neurons, summed over tokens; 0 unless a penalty asked for it.
    pub l1_sum: f64,
}

impl StepLoss {
    /// Mean cross-entropy of a target token.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

impl std::ops::AddAssign for StepLoss {
    fn add_assign(&mut self, other: StepLoss) {
        self.sum += other.sum;
        self.count += other.count;
        self.kl_sum += other.kl_sum;
        self.l1_sum += other.l1_sum;
    }
}

/// Is told of parameters whose gradients are final; some may be frozen, or not there at all.
pub type OnFinal<'a> = &'a mut dyn FnMut(&Gradients, &[ParamId]) -> Result<()>;

impl Decoder {
    /// The loss of a batch. `targets[i]` is what token `i` should predict, or
    /// [`crate::IGNORE`].
    ///
    /// # Errors
    /// A token, position or target outside the model.
    pub fn loss(&self, tokens: &Tokens, targets: &[i64], tap: &mut dyn Tap) -> Result<StepLoss> {
        self.check_targets(tokens, targets)?;
        let hidden = self.hidden(tokens, tap)?;
        let out = loss::cross_entropy(&hidden, &self.head()?, targets, None, None)?;
        Ok(StepLoss { sum: out.sum, count: out.count, ..StepLoss::default() })
    }

    /// The loss of a batch, and its gradients written or added to `gradients`.
    ///
    /// # Errors
    /// A token, position or target outside the model; a teacher of another vocabulary.
    pub fn forward_backward(
        &self,
        tokens: &Tokens,
        targets: &[i64],
        objective: &Objective<'_>,
        gradients: &mut Gradients,
        tap: &mut dyn Tap,
    ) -> Result<StepLoss> {
        self.forward_backward_with(tokens, targets, objective, gradients, tap, &mut |_, _| Ok(()))
    }

    /// As [`Decoder::forward_backward`]; `on_final` is called with parameters as soon as the pass
    /// will not write their gradients again, nor read the parameters: an optimizer may step them.
    /// Every trained parameter is named once, layers from the last to the first.
    ///
    /// # Errors
    /// As [`Decoder::forward_backward`], and those of `on_final`.
    pub fn forward_backward_with(
        &self,
        tokens: &Tokens,
        targets: &[i64],
        objective: &Objective<'_>,
        gradients: &mut Gradients,
        tap: &mut dyn Tap,
        on_final: OnFinal<'_>,
    ) -> Result<StepLoss> {
        self.check_targets(tokens, targets)?;
        let gradients = &*gradients;
        let walk = self.walk(tokens, objective.recompute, tap)?;
        let mut loss = self.loss_backward(tokens, targets, objective, gradients, &walk.hidden)?;
        if !self.spec().head.tied {
            on_final(gradients, &[ParamId::Head])?;
        }
        on_final(gradients, &[ParamId::HeadBias])?;
        let l1 = objective.l1.map(|lambda| L1 {
            lambda: lambda * objective.scale / self.layers.len().max(1) as f32,
            sum: 0.0,
        });
        let d_hidden =
            loss.dh.take().ok_or_else(|| Error::Invalid("no gradient of the loss".to_owned()))?;
        let l1 = self.walk_back(tokens, walk, d_hidden, gradients, l1, on_final)?;
        // Only now, when a GPU has the way back to do: it would stand still else.
        let out = loss.wait()?;
        Ok(StepLoss {
            sum: out.sum,
            count: out.count,
            kl_sum: out.kl_sum,
            l1_sum: l1.map_or(0.0, |l1| l1.sum / self.layers.len().max(1) as f64),
        })
    }

    fn loss_backward(
        &self,
        tokens: &Tokens,
        targets: &[i64],
        objective: &Objective<'_>,
        gradients: &Gradients,
        hidden: &Tensor,
    ) -> Result<Queued> {
        let taught = match objective.teacher {
            None => None,
            Some(teacher) => Some((teacher, teacher.decoder.hidden(tokens, &mut NoTap)?)),
        };
        let teacher = match &taught {
            None => None,
            Some((teacher, hidden)) => Some(Teacher {
                hidden,
                head: teacher.decoder.head()?,
                temperature: teacher.temperature,
                weight: teacher.weight,
            }),
        };
        let weight = gradients.target(self.head_id());
        let bias = gradients.target(ParamId::HeadBias);
        let backward = Backward {
            scale: objective.scale,
            // The head is one slot: it is trained whole or not at all.
            dweight: weight.as_ref().and_then(|target| {
                Some((target.rows.first()?.clone(), (target.tensor, target.accum)))
            }),
            dbias: bias.as_ref().map(|target| (target.tensor, target.accum)),
        };
        let (head, teacher) = (self.head()?, teacher.as_ref());
        Ok(loss::queue_cross_entropy(hidden, &head, targets, teacher, Some(&backward))?)
    }

    fn walk_back(
        &self,
        tokens: &Tokens,
        walk: Walk,
        d_hidden: Tensor,
        gradients: &Gradients,
        l1: Option<L1>,
        on_final: OnFinal<'_>,
    ) -> Result<Option<L1>> {
        let (weight, bias) =
            (gradients.target(ParamId::FinalNorm), gradients.target(ParamId::FinalNormBias));
        // The gradient of the residual stream: one buffer, changed in place by every block.
        let dx = buffer::room_like(&walk.last)?;
        norm::backward(
            &walk.last,
            &self.last_norm()?,
            &walk.final_stats,
            &d_hidden,
            (&dx, Accum::Overwrite),
            weight.as_ref().map(|target| (target.tensor, target.accum)),
            bias.as_ref().map(|target| (target.tensor, target.accum)),
        )?;
        drop((d_hidden, walk.hidden, walk.last));
        on_final(gradients, &[ParamId::FinalNorm, ParamId::FinalNormBias])?;
        let rope = self.prepare(tokens)?;
        let mut pass = BackwardPass { tokens, rope: rope.as_deref(), gradients, l1 };
        let embeds = gradients.wants(ParamId::Embed) || gradients.wants(ParamId::Positions);
        let lowest = if embeds { Some(0) } else { gradients.lowest_layer() };
        for (n, saved) in walk.blocks.into_iter().enumerate().rev() {
            if lowest.is_none_or(|lowest| n < lowest) {
                break;
            }
            let below = embeds || lowest.is_some_and(|lowest| n > lowest);
            self.block_backward(n, saved, &dx, below, &mut pass)?;
            on_final(gradients, &LayerParam::ALL.map(|param| ParamId::Layer(n, param)))?;
        }
        let l1 = pass.l1;
        if let Some(target) = gradients.target(ParamId::Embed) {
            let multiplier = self.spec().embedding.multiplier.map(|factor| factor as f32);
            embedding::backward(&tokens.ids, &dx, multiplier, (target.tensor, target.accum))?;
        }
        if let (Some(target), Position::Learned { offset }) =
            (gradients.target(ParamId::Positions), &self.spec().position)
        {
            let rows = position_rows(tokens, *offset);
            embedding::backward(&rows, &dx, None, (target.tensor, target.accum))?;
        }
        on_final(gradients, &[ParamId::Embed, ParamId::Positions])?;
        Ok(l1)
    }

    fn check_targets(&self, tokens: &Tokens, targets: &[i64]) -> Result<()> {
        if tokens.len() == targets.len() {
            return Ok(());
        }
        let (targets, tokens) = (targets.len(), tokens.len());
        Err(Error::Invalid(format!("{targets} targets for {tokens} tokens")))
    }
}
