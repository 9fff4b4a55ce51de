//! A decoder's weights, packed for decoding.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use relufy_model::layer::{LayerPlan, NormPlan, inverse_frequencies, norm_plan, rope_pairs};
use relufy_model::{Decoder, LayerParam, ParamId, Params};
use relufy_ops::buffer::{to_host, view};
use relufy_ops::norm::{Norm, RowNorm};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::{RopePairs, RopeTable};
use relufy_spec::{DecoderSpec, Position};

use crate::kernels::Isa;
use crate::linear::Linear;
use crate::matrix::{Matrix, padded};
use crate::pool::Pool;
use crate::source::{Source, mix};
use crate::{Error, Format, Result};

/// How weights are packed and who decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How weights are stored.
    pub format: Format,
    /// Threads that decode one token together; 0 for all processors.
    pub threads: usize,
    /// The most tokens of a sequence; 0 for all positions of the model. Never more than those.
    pub context: usize,
}

impl Default for Options {
    /// f16 on all processors, with all positions.
    fn default() -> Options {
        Options { format: Format::F16, threads: 0, context: 0 }
    }
}

/// A decoder packed for decoding. Copies share the weights and the threads; sequences of several
/// [`Session`](crate::Session)s are decoded in turns, token by token.
#[derive(Clone)]
pub struct Engine {
    pub(crate) packed: Arc<Packed>,
}

/// What an [`Engine`] shares.
pub(crate) struct Packed {
    pub spec: DecoderSpec,
    pub format: Format,
    pub context: usize,
    pub isa: Isa,
    pub pool: Pool,
    /// The embedding, where it is not the head.
    embed: Option<Matrix>,
    /// Learned positions, `[positions, hidden]`.
    positions: Option<Matrix>,
    pub layers: Vec<PackedLayer>,
    pub final_norm: RowNorm,
    pub head: Linear,
    pub rope: Option<(RopeTable, RopePairs)>,
    /// `0, 1, 2, ...`: the list of all rows.
    pub identity: Vec<u32>,
}

/// One layer.
pub(crate) struct PackedLayer {
    pub plan: LayerPlan,
    pub attention_norm: RowNorm,
    /// `None` where one norm is shared.
    pub mlp_norm: Option<RowNorm>,
    pub q_norm: Option<RowNorm>,
    pub k_norm: Option<RowNorm>,
    pub qkv: Linear,
    pub o: Linear,
    /// The gate, or `up` of a plain MLP: the projection that says which neurons are active.
    pub first: Linear,
    /// By neuron: its row of `up` beside its row of `down`; in a plain MLP that of `down` alone.
    pub neurons: Matrix,
    /// Bias of a gated MLP's `up`; empty where there is none.
    pub up_bias: Vec<f32>,
    pub down_bias: Vec<f32>,
}

impl Engine {
    /// Packs a decoder's weights. The decoder is not needed afterwards.
    ///
    /// # Errors
    /// A decoder that is not on the CPU in f32; no memory, no thread.
    pub fn new(decoder: &Decoder, options: &Options) -> Result<Engine> {
        Engine::pack(decoder.spec(), &Weights::Params(decoder.params()), options)
    }

    /// An engine with random weights (norms one, biases zero): for measurements, where only the
    /// shape matters.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn random(spec: &DecoderSpec, options: &Options, seed: u64) -> Result<Engine> {
        Engine::pack(spec, &Weights::Random(seed), options)
    }

    fn pack(spec: &DecoderSpec, weights: &Weights<'_>, options: &Options) -> Result<Engine> {
        let format = options.format;
        let context = match options.context {
            0 => spec.max_positions,
            wanted => wanted.min(spec.max_positions),
        };
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let layers = (0..spec.layers.len())
            .map(|n| PackedLayer::pack(spec, n, weights, format))
            .collect::<Result<Vec<_>>>()?;
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        // Only one row is read of these: nothing is saved by less than half precision.
        let table = if format == Format::Int8 { Format::F16 } else { format };
        let pack_table = |id, rows| {
            weights.matrix(id, 0..rows, hidden, |source| {
                Matrix::pack(table, (rows, hidden, 1), |_, rows, out| {
                    source.rows(rows, hidden, out);
                })
            })
        };
        let embed = match spec.head.tied {
            true => None,
            false => Some(pack_table(ParamId::Embed, vocab)?),
        };
        let positions = match spec.position {
            Position::Learned { offset } => {
                Some(pack_table(ParamId::Positions, spec.max_positions + offset)?)
            }
            _ => None,
        };
        let head_id = if spec.head.tied { ParamId::Embed } else { ParamId::Head };
        let bias = weights.vector(ParamId::HeadBias)?.unwrap_or_default();
        let head = weights.matrix(head_id, 0..vocab, hidden, |source| {
            Linear::pack(format, &source, (vocab, hidden), bias, Pointwise::Identity)
        })?;
        let rope = match spec.position {
            Position::Rope { theta, rotary_dim, layout, scaling } => {
                let frequencies = inverse_frequencies(theta, rotary_dim, scaling);
                Some((RopeTable::new(&frequencies, context, 1.0), rope_pairs(layout)))
            }
            _ => None,
        };
        let final_norm = weights.norm(
            norm_plan(&spec.final_norm),
            (ParamId::FinalNorm, Some(ParamId::FinalNormBias)),
            hidden,
            Pointwise::Identity,
        )?;
        let widest = layers.iter().map(|layer| layer.widest()).max().unwrap_or(0);
        let rows = widest.max(vocab).max(context).max(hidden);
        let packed = Packed {
            spec: spec.clone(),
            format,
            context,
            isa: Isa::detect(),
            pool: Pool::new(threads)?,
            embed,
            positions,
            layers,
            final_norm,
            head,
            rope,
            identity: (0..rows as u32).collect(),
        };
        Ok(Engine { packed: Arc::new(packed) })
    }

    /// What the decoder is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.packed.spec
    }

    /// How its weights are stored.
    pub fn format(&self) -> Format {
        self.packed.format
    }

    /// How many threads decode.
    pub fn threads(&self) -> usize {
        self.packed.pool.workers()
    }

    /// The most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.packed.context
    }

    /// Bytes of the packed weights in memory.
    pub fn bytes(&self) -> usize {
        let packed = &*self.packed;
        let tables = [&packed.embed, &packed.positions].into_iter().flatten().map(Matrix::bytes);
        let layers = packed.layers.iter().map(|layer| {
            layer.qkv.bytes() + layer.o.bytes() + layer.first.bytes() + layer.neurons.bytes()
        });
        packed.head.bytes() + tables.sum::<usize>() + layers.sum::<usize>()
    }
}

impl Packed {
    /// The residual stream of a token at a position.
    pub fn embed(&self, token: u32, position: usize, x: &mut [f32], room: &mut [f32]) {
        let table = self.embed.as_ref().unwrap_or(self.head.matrix());
        table.all().decode(token as usize, x);
        if let Some(factor) = self.spec.embedding.multiplier {
            x.iter_mut().for_each(|x| *x *= factor as f32);
        }
        if let (Some(table), Position::Learned { offset }) = (&self.positions, &self.spec.position)
        {
            table.all().decode(position + offset, room);
            x.iter_mut().zip(room).for_each(|(x, p)| *x += *p);
        }
    }
}

impl PackedLayer {
    fn pack(
        spec: &DecoderSpec,
        n: usize,
        weights: &Weights<'_>,
        format: Format,
    ) -> Result<PackedLayer> {
        let layer = &spec.layers[n];
        let plan = LayerPlan::new(layer, &spec.position);
        let hidden = spec.hidden;
        let id = |param| ParamId::Layer(n, param);
        let bias = |param| weights.vector(id(param)).map(Option::unwrap_or_default);
        let head_norm = |param| match plan.qk_norm {
            Some(norm) => {
                let ids = (id(param), None);
                weights.norm(norm, ids, plan.heads.head_dim, Pointwise::Identity).map(Some)
            }
            None => Ok(None),
        };
        let width = plan.q_width + 2 * plan.kv_width;
        let qkv_bias = bias(LayerParam::QkvBias)?;
        let qkv = weights.matrix(id(LayerParam::Qkv), 0..width, hidden, |source| {
            Linear::pack(format, &source, (width, hidden), qkv_bias, plan.qkv_in)
        })?;
        let o_bias = bias(LayerParam::OBias)?;
        let o = weights.matrix(id(LayerParam::O), 0..hidden, plan.q_width, |source| {
            Linear::pack(format, &source, (hidden, plan.q_width), o_bias, plan.o_in)
        })?;
        let ffn = plan.ffn;
        let mut first_bias = bias(LayerParam::UpBias)?;
        let up_bias = match plan.gated && !first_bias.is_empty() {
            true => first_bias.split_off(ffn),
            false => Vec::new(),
        };
        let first = weights.matrix(id(LayerParam::Up), 0..ffn, hidden, |source| {
            Linear::pack(format, &source, (ffn, hidden), first_bias, plan.up_in)
        })?;
        let neurons = weights.matrix(id(LayerParam::Down), 0..hidden, ffn, |down| {
            if !plan.gated {
                return Matrix::pack(format, (ffn, hidden, 1), |_, rows, out| {
                    down.columns(rows, ffn, out);
                });
            }
            weights.matrix(id(LayerParam::Up), ffn..2 * ffn, hidden, |up| {
                Matrix::pack(format, (ffn, hidden, 2), |part, rows, out| match part {
                    0 => up.rows(rows, hidden, out),
                    _ => down.columns(rows, ffn, out),
                })
            })
        })?;
        let attention_ids = (id(LayerParam::AttnNorm), Some(id(LayerParam::AttnNormBias)));
        let mlp_ids = (id(LayerParam::MlpNorm), Some(id(LayerParam::MlpNormBias)));
        let mlp_norm = match layer.shares_norm() {
            true => None,
            false => Some(weights.norm(plan.norm, mlp_ids, hidden, plan.up_in)?),
        };
        Ok(PackedLayer {
            attention_norm: weights.norm(plan.norm, attention_ids, hidden, plan.qkv_in)?,
            mlp_norm,
            q_norm: head_norm(LayerParam::QNorm)?,
            k_norm: head_norm(LayerParam::KNorm)?,
            qkv,
            o,
            first,
            neurons,
            up_bias,
            down_bias: bias(LayerParam::DownBias)?,
            plan,
        })
    }

    fn widest(&self) -> usize {
        padded(self.qkv.outputs.max(self.first.outputs))
    }
}

/// What is packed.
enum Weights<'a> {
    Params(&'a Params),
    Random(u64),
}

impl Weights<'_> {
    /// Shows some rows of a matrix `[.., inputs]`.
    fn matrix<R>(
        &self,
        id: ParamId,
        rows: std::ops::Range<usize>,
        inputs: usize,
        show: impl FnOnce(Source<'_>) -> Result<R>,
    ) -> Result<R> {
        match self {
            Weights::Params(params) => {
                let tensor = params.get(id).ok_or_else(|| missing(id))?;
                let values = view(tensor, "packing weights")?;
                show(Source::Values(&values[rows.start * inputs..rows.end * inputs]))
            }
            Weights::Random(seed) => {
                let name = format!("{id:?} {rows:?}");
                let seed = name.bytes().fold(*seed, |seed, byte| mix(seed ^ u64::from(byte)));
                show(Source::Random { seed, std: 0.02 })
            }
        }
    }

    /// A bias; `None` where there is none.
    fn vector(&self, id: ParamId) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Weights::Params(params) => params.get(id).map(to_host).transpose()?,
            Weights::Random(_) => None,
        })
    }

    fn norm(
        &self,
        plan: NormPlan,
        (weight, bias): (ParamId, Option<ParamId>),
        width: usize,
        post: Pointwise,
    ) -> Result<RowNorm> {
        let norm = |weight, bias| Norm { kind: plan.kind, eps: plan.eps, weight, bias, post };
        Ok(match self {
            Weights::Params(params) => {
                let weight = params.get(weight).ok_or_else(|| missing(weight))?;
                RowNorm::new(&norm(weight, bias.and_then(|bias| params.get(bias))))?
            }
            Weights::Random(_) => {
                let ones = Tensor::ones(width, candle_core::DType::F32, &Device::Cpu)
                    .map_err(relufy_ops::Error::from)?;
                RowNorm::new(&norm(&ones, None))?
            }
        })
    }
}

fn missing(id: ParamId) -> Error {
    Error::Decoder(format!("no parameter {id:?}"))
}
