//! What a session owns on the GPU: activations, keys and values, and words. All of it stays where it
//! is, for graphs name addresses.

use candle_core::{DType, Tensor};
use relufy_model::layer::LayerPlan;
use relufy_ops::buffer::write_from_host;
use relufy_ops::decode::{GpuMatrix, KvCache, Room, Words};

use super::counts::words;
use super::engine::{GpuEngine, Packed};
use crate::Result;
use crate::force::Forced;

/// Activations of `batch` tokens, f32, and all else that a step reads and writes.
pub(super) struct Buffers {
    /// The token of each sequence, and its position.
    pub tokens: Words,
    pub positions: Words,
    /// The residual stream, `[batch, hidden]`.
    pub x: Tensor,
    /// What `up` reads, `[batch, hidden]`.
    pub h: Tensor,
    /// `[batch, vocab]`.
    pub logits: Tensor,
    pub layers: Vec<LayerBuffers>,
    /// As [`super::counts`] lays them out.
    pub counts: Words,
    pub room: Room,
    pub masks: Option<Masks>,
}

/// A layer's activations, which all layers write at the same place, and its keys and values.
pub(super) struct LayerBuffers {
    pub qkv: Tensor,
    pub attended: Tensor,
    /// The gate, or a plain MLP's `up`, before its activation.
    pub gate: Tensor,
    pub products: Tensor,
    /// Gates and `up` side by side, where they are one matrix.
    pub sums: Tensor,
    pub cache: KvCache,
}

/// Forced densities: ones where a non-zero is put, f32.
pub(crate) struct Masks {
    /// All of them, one layer after the other: queries, `up`, gate.
    all: Tensor,
    /// Views of `all`.
    pub layers: Vec<[Tensor; 3]>,
}

/// Blocks make sums of whole tiles of columns, also at a matrix's end: the widest there are.
const TILE: usize = 512;

impl Buffers {
    pub fn new(packed: &Packed, batch: usize, masks: Option<Masks>) -> Result<Buffers> {
        let (spec, device) = (&packed.spec, &packed.device);
        let plans = || packed.layers.iter().map(|layer| &layer.plan);
        let most = |width: &dyn Fn(&LayerPlan) -> usize| plans().map(width).max().unwrap_or(0);
        let qkv = |plan: &LayerPlan| plan.q_width + 2 * plan.kv_width;
        let flat = |width: usize| Tensor::zeros(batch * width, DType::F32, device);
        let view =
            |flat: &Tensor, width: usize| flat.narrow(0, 0, batch * width)?.reshape((batch, width));
        let ffn = most(&|plan| plan.ffn);
        let columns = |plan: &LayerPlan| GpuMatrix::pair_columns(packed.stored(), plan.ffn);
        let outputs = most(&qkv).max(most(&columns)).max(spec.hidden).next_multiple_of(TILE);
        let (heads, dim) = (most(&|plan| plan.heads.heads), most(&|plan| plan.heads.head_dim));
        let room = Room::new(device, batch, outputs, heads, dim)?;
        let tensors = || -> candle_core::Result<_> {
            let [wide, attended, gate, products, sums] =
                [most(&qkv), most(&|plan| plan.q_width), ffn, ffn, most(&columns)].map(flat);
            let (wide, attended, gate, products) = (wide?, attended?, gate?, products?);
            let sums = sums?;
            let views = plans().map(|plan| {
                Ok([
                    view(&wide, qkv(plan))?,
                    view(&attended, plan.q_width)?,
                    view(&gate, plan.ffn)?,
                    view(&products, plan.ffn)?,
                    view(&sums, columns(plan))?,
                ])
            });
            let views = views.collect::<candle_core::Result<Vec<_>>>()?;
            let row = |width| Tensor::zeros((batch, width), DType::F32, device);
            Ok((views, row(spec.hidden)?, row(spec.hidden)?, row(spec.vocab)?))
        };
        let (views, x, h, logits) = tensors().map_err(relufy_ops::Error::from)?;
        let layers = plans().zip(views).map(|(plan, [qkv, attended, gate, products, sums])| {
            let heads = (plan.heads.kv_heads, plan.heads.head_dim);
            let format = packed.kv_format();
            let cache = KvCache::new(device, format, batch, packed.context, heads)?;
            Ok(LayerBuffers { qkv, attended, gate, products, sums, cache })
        });
        Ok(Buffers {
            tokens: Words::zeros(device, batch)?,
            positions: Words::zeros(device, batch)?,
            x,
            h,
            logits,
            layers: layers.collect::<Result<_>>()?,
            counts: Words::zeros(device, words(packed.layers.len()))?,
            room,
            masks,
        })
    }
}

impl Masks {
    /// Room for the masks of every layer.
    pub fn new(engine: &GpuEngine) -> Result<Masks> {
        let packed = &*engine.packed;
        let (hidden, ffn) = (packed.spec.hidden, |n: usize| packed.layers[n].plan.ffn);
        let make = || -> candle_core::Result<Masks> {
            let layers = 0..packed.layers.len();
            let len = layers.clone().map(|n| 2 * room(hidden) + room(ffn(n))).sum::<usize>();
            let all = Tensor::zeros(len, DType::F32, &packed.device)?;
            let mut from = 0;
            let mut next = |len: usize| {
                from += room(len);
                all.narrow(0, from - room(len), len)
            };
            let layers = layers.map(|n| Ok([next(hidden)?, next(hidden)?, next(ffn(n))?]));
            let layers = layers.collect::<candle_core::Result<_>>()?;
            Ok(Masks { all, layers })
        };
        Ok(make().map_err(relufy_ops::Error::from)?)
    }

    /// Puts what was drawn in their place.
    pub fn write(&self, forced: &Forced) -> Result<()> {
        let layers = (0..self.layers.len()).filter_map(|n| forced.layer(n));
        let mut all = Vec::new();
        for masks in layers {
            for mask in [&masks.qkv, &masks.up, &masks.gate] {
                all.extend_from_slice(mask);
                all.resize(all.len() - mask.len() + room(mask.len()), 0.0);
            }
        }
        Ok(write_from_host(&self.all, &all)?)
    }
}

/// What so many numbers take, for the next to start where 16 bytes do.
fn room(len: usize) -> usize {
    len.next_multiple_of(4)
}
