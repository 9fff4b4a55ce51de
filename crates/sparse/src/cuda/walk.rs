//! One token's way through the layers: the kernels that are queued, in their order.
//!
//! ```text
//! embedding
//! norm, list, queries, keys, values      one kernel
//! rotation, cache, attention             one
//! output projection, onto the stream     one; in a parallel block after the MLP's first half
//! norm, list, gate; open neurons of up   two; one where nothing is skipped
//! list, down, onto the stream            one
//! norm, head                             one
//! ```

use relufy_model::layer::Joins;
use relufy_ops::decode::{Input, Output, UpRows, attend, embed, gate_and_up, up_rows};
use relufy_ops::pointwise::Pointwise;

use super::counts::{Place, at, at_head};
use super::engine::Packed;
use super::layer::{Layer, Mlp};
use super::room::{Buffers, LayerBuffers};
use crate::Result;

/// One step on its way to the GPU.
pub(super) struct Walk<'a> {
    pub packed: &'a Packed,
    pub buffers: &'a Buffers,
}

impl Walk<'_> {
    /// Queues everything from the tokens to the logits.
    pub fn queue(&self) -> Result<()> {
        let Walk { packed, buffers } = *self;
        let (spec, learned) = (&packed.spec, packed.positions.as_ref());
        embed(
            &buffers.tokens,
            &buffers.positions,
            packed.table(),
            spec.embedding.multiplier.map_or(1.0, |factor| factor as f32),
            learned.map(|(table, offset)| (table, *offset)),
            &buffers.x,
        )?;
        for (n, (layer, own)) in packed.layers.iter().zip(&buffers.layers).enumerate() {
            self.attention(n, layer, own)?;
            // The MLP of a parallel block reads the stream as it was before attention.
            match layer.plan.joins {
                Joins::Sequential => {
                    self.project(n, layer, own)?;
                    self.neurons(n, layer, own)?;
                }
                Joins::ParallelShared | Joins::ParallelSeparate => {
                    self.neurons(n, layer, own)?;
                    self.project(n, layer, own)?;
                }
            }
            self.down(n, layer, own)?;
        }
        let input = Input {
            counts: Some((&buffers.counts, at_head(packed.layers.len()))),
            ..Input::normed(&buffers.x, &packed.final_norm, Pointwise::Identity)
        };
        let head = &packed.head;
        let output = Output {
            softcap: spec.head.softcap.map(|cap| cap as f32),
            ..Output::new(&buffers.logits, head.bias.as_ref())
        };
        head.queue(&input, &output, &buffers.room)
    }

    /// Queries, keys and values, and what they attend to.
    fn attention(&self, n: usize, layer: &Layer, own: &LayerBuffers) -> Result<()> {
        let buffers = self.buffers;
        let input = Input {
            mask: self.mask(n, 0),
            ..Input::normed(&buffers.x, &layer.attention_norm, layer.plan.qkv_in)
        };
        layer.qkv.write(&self.counted(input, n, Place::Qkv), &own.qkv, &buffers.room)?;
        let (positions, room) = (&buffers.positions, &buffers.room);
        Ok(attend(&own.qkv, positions, &layer.attention, &own.cache, room, &own.attended)?)
    }

    /// Attention's output projection, onto the residual stream.
    fn project(&self, n: usize, layer: &Layer, own: &LayerBuffers) -> Result<()> {
        let input = Input { op: layer.plan.o_in, ..Input::new(&own.attended) };
        let buffers = self.buffers;
        layer.o.add(&self.counted(input, n, Place::O), &buffers.x, &buffers.room)
    }

    /// The MLP up to what `down` reads.
    fn neurons(&self, n: usize, layer: &Layer, own: &LayerBuffers) -> Result<()> {
        let (buffers, plan) = (self.buffers, &layer.plan);
        // A shared norm has the operation of the first site.
        let (norm, op, mask) = match &layer.mlp_norm {
            Some(norm) => (norm, plan.up_in, 1),
            None => (&layer.attention_norm, plan.qkv_in, 0),
        };
        let input = Input { mask: self.mask(n, mask), ..Input::normed(&buffers.x, norm, op) };
        let input = self.counted(input, n, Place::Up);
        match &layer.mlp {
            Mlp::Plain { up, .. } => up.write(&input, &own.gate, &buffers.room),
            Mlp::Whole { gate, up, up_bias, .. } => {
                let gate = (&gate.matrix, gate.bias.as_ref());
                let curves = (plan.activation, plan.down_in);
                let up = (up, up_bias.as_ref());
                Ok(gate_and_up(&input, gate, up, curves, &own.products)?)
            }
            Mlp::Neurons { gate, up, up_bias, .. } => {
                let input = Input { h: Some(&buffers.h), ..input };
                gate.write(&input, &own.gate, &buffers.room)?;
                Ok(up_rows(&UpRows {
                    gate: &own.gate,
                    activation: plan.activation,
                    mask: self.mask(n, 2),
                    h: &buffers.h,
                    up,
                    bias: up_bias.as_ref(),
                    then: plan.down_in,
                    products: &own.products,
                    counts: Some((&buffers.counts, at(n, Place::Gate))),
                })?)
            }
        }
    }

    /// The MLP's last projection, onto the residual stream.
    fn down(&self, n: usize, layer: &Layer, own: &LayerBuffers) -> Result<()> {
        let (buffers, plan) = (self.buffers, &layer.plan);
        let (input, down) = match &layer.mlp {
            Mlp::Plain { down, .. } => {
                let (op, mask, then) = (plan.activation, self.mask(n, 2), plan.down_in);
                (Input { op, mask, then, ..Input::new(&own.gate) }, down)
            }
            Mlp::Neurons { down, .. } | Mlp::Whole { down, .. } => {
                (Input::new(&own.products), down)
            }
        };
        down.add(&self.counted(input, n, Place::Down), &buffers.x, &buffers.room)
    }

    fn counted<'a>(&'a self, input: Input<'a>, n: usize, place: Place) -> Input<'a> {
        Input { counts: Some((&self.buffers.counts, at(n, place))), ..input }
    }

    /// The forced zeros of queries, `up` or the gate.
    fn mask(&self, n: usize, which: usize) -> Option<&candle_core::Tensor> {
        self.buffers.masks.as_ref().map(|masks| &masks.layers[n][which])
    }
}
