//! The decoder: a spec with weights, and the one walk over its layers.

use std::sync::{Arc, RwLock};

use candle_core::{Device, Tensor};
use relufy_ops::loss::{self, Head, TokenScore};
use relufy_ops::norm::{self, Norm, NormStats};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::RopeTable;
use relufy_ops::{embedding, reduce};
use relufy_spec::{DecoderSpec, Position};

use crate::block::Saved;
use crate::layer::{LayerPlan, NormPlan, inverse_frequencies, norm_plan};
use crate::params::empty_layout;
use crate::tap::Deferred;
use crate::{Error, KvRows, LayerParam, ParamId, Params, Recompute, Result, Tap, Tokens};

/// A decoder that runs.
pub struct Decoder {
    spec: DecoderSpec,
    params: Params,
    device: Device,
    pub(crate) layers: Vec<LayerPlan>,
    final_norm: NormPlan,
    /// Grows with the longest position seen: a 128 k context would cost 64 MiB up front.
    rope: RwLock<Option<Arc<RopeTable>>>,
}

/// What a walk with saved activations leaves behind for the backward pass.
pub(crate) struct Walk {
    /// What each block needs for its backward pass.
    pub blocks: Vec<Saved>,
    /// The residual stream in front of the last norm.
    pub last: Tensor,
    pub final_stats: NormStats,
    /// `[n_tokens, hidden]` after the last norm.
    pub hidden: Tensor,
}

impl Decoder {
    /// Joins a spec with its weights.
    ///
    /// # Errors
    /// Parameters that are not those of the spec; a spec with something that this decoder
    /// does not do, by name.
    pub fn new(spec: DecoderSpec, params: Params) -> Result<Decoder> {
        let expected = empty_layout(&spec);
        let fits = expected.len() == params.len()
            && expected.iter().zip(params.iter()).all(|(layout, param)| {
                layout.id == param.id && layout.shape == param.tensor.dims()
            });
        if !fits {
            return Err(Error::Invalid("the parameters are not those of the spec".to_owned()));
        }
        let device =
            params.iter().next().map_or(Device::Cpu, |param| param.tensor.device().clone());
        let layers =
            spec.layers.iter().map(|layer| LayerPlan::new(layer, &spec.position)).collect();
        let final_norm = norm_plan(&spec.final_norm);
        Ok(Decoder { spec, params, device, layers, final_norm, rope: RwLock::new(None) })
    }

    /// What the decoder is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Its weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Where they live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The hidden states `[n_tokens, hidden]` after the last norm.
    ///
    /// # Errors
    /// A token or position outside the model.
    pub fn hidden(&self, tokens: &Tokens, tap: &mut dyn Tap) -> Result<Tensor> {
        self.infer(tokens, None, tap)
    }

    /// As [`Decoder::hidden`], with earlier tokens in a cache: `tokens` come from
    /// [`KvCache::extend`](crate::KvCache::extend) or
    /// [`KvTree::announced`](crate::KvTree::announced).
    ///
    /// # Errors
    /// As [`Decoder::hidden`]; tokens that the cache was not told of.
    pub fn hidden_cached(
        &self,
        tokens: &Tokens,
        cache: &mut impl AsMut<KvRows>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        let cache = cache.as_mut();
        if cache.pending() != tokens.len() {
            let (announced, given) = (cache.pending(), tokens.len());
            let why = format!("the cache was told of {announced} tokens, not of {given}");
            return Err(Error::Invalid(why));
        }
        let hidden = self.infer(tokens, Some(cache), tap)?;
        cache.passed();
        Ok(hidden)
    }

    /// The logits `[rows, vocab]` of hidden states.
    ///
    /// # Errors
    /// A wrong shape.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(loss::logits(hidden, &self.head()?)?)
    }

    /// The log-probabilities of `wanted` pairs of a row and a token, in their order, without
    /// the whole logits in memory. Rows that are not named cost nothing, others are multiplied
    /// by the head once.
    ///
    /// # Errors
    /// A row that `hidden` does not have, a token outside the vocabulary.
    pub fn score(&self, hidden: &Tensor, wanted: &[(u32, u32)]) -> Result<Vec<TokenScore>> {
        Ok(loss::score_tokens(hidden, &self.head()?, wanted)?)
    }

    /// The first of the most likely tokens after each row, without the whole logits in memory;
    /// `None` where a logit is no number.
    ///
    /// # Errors
    /// A wrong shape.
    pub fn greedy(&self, hidden: &Tensor) -> Result<Vec<Option<u32>>> {
        Ok(loss::greedy_tokens(hidden, &self.head()?)?)
    }

    fn infer(&self, tokens: &Tokens, cache: Option<&KvRows>, tap: &mut dyn Tap) -> Result<Tensor> {
        let rope = self.prepare(tokens)?;
        let mut x = self.embed(tokens)?;
        let mut tap = Deferred::new(tap);
        for n in 0..self.layers.len() {
            (x, _) = self.block(n, x, tokens, rope.as_deref(), cache, &mut tap)?;
        }
        tap.finish()?;
        Ok(norm::forward(&x, &self.last_norm()?)?.0)
    }

    /// The walk that keeps what the backward pass needs.
    pub(crate) fn walk(
        &self,
        tokens: &Tokens,
        recompute: Recompute,
        tap: &mut dyn Tap,
    ) -> Result<Walk> {
        let rope = self.prepare(tokens)?;
        let mut x = self.embed(tokens)?;
        let mut blocks = Vec::with_capacity(self.layers.len());
        let mut tap = Deferred::new(tap);
        for n in 0..self.layers.len() {
            let (out, saved) = self.block(n, x.clone(), tokens, rope.as_deref(), None, &mut tap)?;
            blocks.push(Saved::keep(x, saved, recompute));
            x = out;
        }
        tap.finish()?;
        let (hidden, final_stats) = norm::forward(&x, &self.last_norm()?)?;
        Ok(Walk { blocks, last: x, final_stats, hidden })
    }

    /// Checks the tokens and makes sure that the rotary table reaches their positions.
    pub(crate) fn prepare(&self, tokens: &Tokens) -> Result<Option<Arc<RopeTable>>> {
        tokens.check(self.spec.vocab, self.spec.max_positions)?;
        let Position::Rope { theta, rotary_dim, scaling, .. } = self.spec.position else {
            return Ok(None);
        };
        let needed = tokens.positions.iter().max().map_or(0, |last| *last as usize + 1);
        if let Ok(table) = self.rope.read()
            && let Some(table) = table.as_ref().filter(|table| table.max_pos() >= needed)
        {
            return Ok(Some(table.clone()));
        }
        let reach = needed.next_power_of_two().max(256).min(self.spec.max_positions);
        let frequencies = inverse_frequencies(theta, rotary_dim, scaling);
        let table = Arc::new(RopeTable::new(&frequencies, reach, 1.0));
        if let Ok(mut slot) = self.rope.write() {
            *slot = Some(table.clone());
        }
        Ok(Some(table))
    }

    fn embed(&self, tokens: &Tokens) -> Result<Tensor> {
        let multiplier = self.spec.embedding.multiplier.map(|factor| factor as f32);
        let x = embedding::forward(self.param(ParamId::Embed)?, &tokens.ids, multiplier)?;
        if let Position::Learned { offset } = self.spec.position {
            let rows = position_rows(tokens, offset);
            embedding::add_rows(&x, self.param(ParamId::Positions)?, &rows)?;
        }
        Ok(x)
    }

    pub(crate) fn last_norm(&self) -> Result<Norm<'_>> {
        self.norm(self.final_norm, ParamId::FinalNorm, ParamId::FinalNormBias, Pointwise::Identity)
    }

    pub(crate) fn norm(
        &self,
        plan: NormPlan,
        weight: ParamId,
        bias: ParamId,
        post: Pointwise,
    ) -> Result<Norm<'_>> {
        Ok(Norm {
            kind: plan.kind,
            eps: plan.eps,
            weight: self.param(weight)?,
            bias: self.params.get(bias),
            post,
        })
    }

    /// The projection onto the vocabulary.
    pub(crate) fn head(&self) -> Result<Head<'_>> {
        Ok(Head {
            weight: self.param(self.head_id())?,
            bias: self.params.get(ParamId::HeadBias),
            softcap: self.spec.head.softcap.map(|cap| cap as f32),
        })
    }

    pub(crate) fn head_id(&self) -> ParamId {
        if self.spec.head.tied { ParamId::Embed } else { ParamId::Head }
    }

    /// A parameter that the spec says is there.
    pub(crate) fn param(&self, id: ParamId) -> Result<&Tensor> {
        self.params.get(id).ok_or_else(|| Error::Invalid(format!("no parameter {id:?}")))
    }

    /// A parameter of a layer; `None` where the layer has no such thing (a bias).
    pub(crate) fn layer_param(&self, n: usize, param: LayerParam) -> Option<&Tensor> {
        self.params.get(ParamId::Layer(n, param))
    }
}

/// The rows of the position table that the tokens look up.
pub(crate) fn position_rows(tokens: &Tokens, offset: usize) -> Vec<u32> {
    tokens.positions.iter().map(|position| position + offset as u32).collect()
}

/// `a + b`, in the memory of `b`.
pub(crate) fn add_into(a: &Tensor, b: Tensor) -> Result<Tensor> {
    reduce::add_in_place(&b, a)?;
    Ok(b)
}
