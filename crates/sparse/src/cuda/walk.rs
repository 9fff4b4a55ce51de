//! One token's way through the layers: the operations, in their order.
//!
//! ```text
//! embedding
//! norm, list, queries, keys, values
//! rotation, cache, attention
//! output projection, onto the stream     in a parallel block after the MLP's first half
//! norm, list, gate; open neurons of up
//! list, down, onto the stream
//! norm, head
//! ```

use relufy_model::layer::Joins;
use relufy_ops::decode::{Attention, Embedding, Input, Output, PairsByInput, UpRows, Work};
use relufy_ops::pointwise::Pointwise;

use super::counts::{Place, at, at_head};
use super::engine::Packed;
use super::layer::{Layer, Linear, Mlp};
use super::room::{Buffers, LayerBuffers};

/// One step on its way to the GPU.
#[derive(Clone, Copy)]
pub(super) struct Walk<'a> {
    pub packed: &'a Packed,
    pub buffers: &'a Buffers,
}

impl<'a> Walk<'a> {
    /// Everything from the tokens to the logits.
    pub fn work(self) -> Vec<Work<'a>> {
        let Walk { packed, buffers } = self;
        let (spec, learned) = (&packed.spec, packed.positions.as_ref());
        let mut work = vec![Work::Embed(Embedding {
            tokens: &buffers.tokens,
            positions: &buffers.positions,
            table: packed.table(),
            factor: spec.embedding.multiplier.map_or(1.0, |factor| factor as f32),
            learned: learned.map(|(table, offset)| (table, *offset)),
            x: &buffers.x,
        })];
        for (n, (layer, own)) in packed.layers.iter().zip(&buffers.layers).enumerate() {
            work.extend(self.attention(n, layer, own));
            let project = self.project(n, layer, own);
            let neurons = self.neurons(n, layer, own);
            // The MLP of a parallel block reads the stream as it was before attention.
            work.extend(match layer.plan.joins {
                Joins::Sequential => [project, neurons],
                Joins::ParallelShared | Joins::ParallelSeparate => [neurons, project],
            });
            work.push(self.down(n, layer, own));
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
        work.push(project(head, input, output));
        work
    }

    /// Queries, keys and values, and what they attend to.
    fn attention(self, n: usize, layer: &'a Layer, own: &'a LayerBuffers) -> [Work<'a>; 2] {
        let buffers = self.buffers;
        let input = Input {
            mask: self.mask(n, 0),
            ..Input::normed(&buffers.x, &layer.attention_norm, layer.plan.qkv_in)
        };
        let output = Output::new(&own.qkv, layer.qkv.bias.as_ref());
        let attention = Attention {
            qkv: &own.qkv,
            positions: &buffers.positions,
            plan: &layer.attention,
            cache: &own.cache,
            out: &own.attended,
        };
        let qkv = project(&layer.qkv, self.counted(input, n, Place::Qkv), output);
        [qkv, Work::Attend(attention)]
    }

    /// Attention's output projection, onto the residual stream.
    fn project(self, n: usize, layer: &'a Layer, own: &'a LayerBuffers) -> Work<'a> {
        let input = Input { op: layer.plan.o_in, ..Input::new(&own.attended) };
        let output = Output::residual(&self.buffers.x, layer.o.bias.as_ref());
        project(&layer.o, self.counted(input, n, Place::O), output)
    }

    /// The MLP up to what `down` reads.
    fn neurons(self, n: usize, layer: &'a Layer, own: &'a LayerBuffers) -> Work<'a> {
        let (buffers, plan) = (self.buffers, &layer.plan);
        // A shared norm has the operation of the first site.
        let (norm, op, mask) = match &layer.mlp_norm {
            Some(norm) => (norm, plan.up_in, 1),
            None => (&layer.attention_norm, plan.qkv_in, 0),
        };
        let input = Input { mask: self.mask(n, mask), ..Input::normed(&buffers.x, norm, op) };
        let input = self.counted(input, n, Place::Up);
        match &layer.mlp {
            Mlp::Plain { up, .. } => project(up, input, Output::new(&own.gate, up.bias.as_ref())),
            Mlp::Whole { gate, up, up_bias, .. } => Work::GateAndUp {
                input,
                gate: (&gate.matrix, gate.bias.as_ref()),
                up: (up, up_bias.as_ref()),
                curves: (plan.activation, plan.down_in),
                products: &own.products,
            },
            Mlp::Pairs { pairs, biases, .. } => Work::PairsByInput(PairsByInput {
                input,
                matrix: pairs,
                biases: biases.each_ref().map(Option::as_ref),
                activation: plan.activation,
                mask: self.mask(n, 2),
                then: plan.down_in,
                sums: &own.sums,
                products: &own.products,
                counts: Some((&buffers.counts, at(n, Place::Gate))),
            }),
            Mlp::Neurons { gate, up, up_bias, .. } => Work::Neurons {
                input: Input { h: Some(&buffers.h), ..input },
                gate: &gate.matrix,
                by_input: gate.by_input,
                bias: gate.bias.as_ref(),
                up: UpRows {
                    gate: &own.gate,
                    activation: plan.activation,
                    mask: self.mask(n, 2),
                    h: &buffers.h,
                    up,
                    bias: up_bias.as_ref(),
                    then: plan.down_in,
                    products: &own.products,
                    counts: Some((&buffers.counts, at(n, Place::Gate))),
                },
            },
        }
    }

    /// The MLP's last projection, onto the residual stream.
    fn down(self, n: usize, layer: &'a Layer, own: &'a LayerBuffers) -> Work<'a> {
        let (buffers, plan) = (self.buffers, &layer.plan);
        let (input, down) = match &layer.mlp {
            Mlp::Plain { down, .. } => {
                let (op, mask, then) = (plan.activation, self.mask(n, 2), plan.down_in);
                (Input { op, mask, then, ..Input::new(&own.gate) }, down)
            }
            Mlp::Neurons { down, .. } | Mlp::Pairs { down, .. } | Mlp::Whole { down, .. } => {
                (Input::new(&own.products), down)
            }
        };
        let output = Output::residual(&buffers.x, down.bias.as_ref());
        project(down, self.counted(input, n, Place::Down), output)
    }

    fn counted(self, input: Input<'a>, n: usize, place: Place) -> Input<'a> {
        Input { counts: Some((&self.buffers.counts, at(n, place))), ..input }
    }

    /// The forced zeros of queries, `up` or the gate.
    fn mask(self, n: usize, which: usize) -> Option<&'a candle_core::Tensor> {
        self.buffers.masks.as_ref().map(|masks| &masks.layers[n][which])
    }
}

/// A projection's product.
fn project<'a>(linear: &'a Linear, input: Input<'a>, output: Output<'a>) -> Work<'a> {
    Work::Project { input, matrix: &linear.matrix, by_input: linear.by_input, output }
}
