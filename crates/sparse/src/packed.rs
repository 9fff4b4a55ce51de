//! A decoder as it is read token by token: matrices in rows that can be skipped.

use relufy_model::layer::{LayerPlan, inverse_frequencies, norm_plan, rope_pairs};
use relufy_model::{LayerParam, ParamId};
use relufy_ops::norm::RowNorm;
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::{RopePairs, RopeTable};
use relufy_spec::{DecoderSpec, Position};

use crate::engine::{Calibrated, Options};
use crate::kernels::Isa;
use crate::layout::LayerLayout;
use crate::linear::Linear;
use crate::matrix::{Matrix, Rows, padded};
use crate::pool::Pool;
use crate::thresholds::SiteThresholds;
use crate::weights::{Part, Weights};
use crate::{Format, Result};

/// What an [`Engine`](crate::Engine) and its sessions share.
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
    pub thresholds: SiteThresholds,
    pub attention_norm: RowNorm,
    /// `None` where one norm is shared.
    pub mlp_norm: Option<RowNorm>,
    pub q_norm: Option<RowNorm>,
    pub k_norm: Option<RowNorm>,
    pub qkv: Linear,
    pub o: Linear,
    /// The gate, or `up` of a plain MLP: the projection that says which neurons are active.
    pub first: Linear,
    /// `up` of a gated MLP, where its inputs are sparser than the gate.
    pub up: Option<Linear>,
    /// By neuron: its row of `up`, unless that is stored by input, beside its row of `down`; in a
    /// plain MLP that of `down` alone.
    pub neurons: Matrix,
    /// Bias of `up` where that is stored by neuron; empty where there is none.
    pub up_bias: Vec<f32>,
    pub down_bias: Vec<f32>,
}

impl Packed {
    /// Takes the weights of a decoder, which `calibrated` fits.
    pub fn new(
        spec: &DecoderSpec,
        weights: &Weights<'_>,
        options: &Options,
        calibrated: &Calibrated,
    ) -> Result<Packed> {
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
            .map(|n| PackedLayer::new(spec, n, weights, format, calibrated))
            .collect::<Result<Vec<_>>>()?;
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        // Only one row is read of these: nothing is saved by less than half precision.
        let table = if format == Format::Int8 { Format::F16 } else { format };
        let whole = |id, rows| Part { id, rows: 0..rows, inputs: hidden, by_input: false };
        let embed = match spec.head.tied {
            true => None,
            false => Some(weights.pack(table, &[whole(ParamId::Embed, vocab)])?),
        };
        let positions = match spec.position {
            Position::Learned { offset } => {
                let rows = spec.max_positions + offset;
                Some(weights.pack(table, &[whole(ParamId::Positions, rows)])?)
            }
            _ => None,
        };
        let head_id = if spec.head.tied { ParamId::Embed } else { ParamId::Head };
        let bias = weights.vector(ParamId::HeadBias)?.unwrap_or_default();
        let head = Linear::pack(weights, format, whole(head_id, vocab), bias)?;
        let rope = match spec.position {
            Position::Rope { theta, rotary_dim, layout, scaling } => {
                let frequencies = inverse_frequencies(theta, rotary_dim, scaling);
                Some((RopeTable::new(&frequencies, context, 1.0), rope_pairs(layout)))
            }
            _ => None,
        };
        let final_ids = (ParamId::FinalNorm, Some(ParamId::FinalNormBias));
        let final_plan = norm_plan(&spec.final_norm);
        let final_norm = weights.norm(final_plan, final_ids, hidden, Pointwise::Identity)?;
        let widest = layers.iter().map(|layer| layer.widest()).max().unwrap_or(0);
        let rows = widest.max(vocab).max(context).max(hidden);
        Ok(Packed {
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
        })
    }

    /// Every matrix.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let tables = [&self.embed, &self.positions].into_iter().flatten();
        let layers = self.layers.iter().flat_map(|layer| {
            let linear = [Some(&layer.qkv), Some(&layer.o), Some(&layer.first), layer.up.as_ref()];
            linear.into_iter().flatten().map(Linear::matrix).chain([&layer.neurons])
        });
        tables.chain(layers).chain([self.head.matrix()])
    }

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
    fn new(
        spec: &DecoderSpec,
        n: usize,
        weights: &Weights<'_>,
        format: Format,
        calibrated: &Calibrated,
    ) -> Result<PackedLayer> {
        let layer = &spec.layers[n];
        let plan = LayerPlan::new(layer, &spec.position);
        let thresholds = calibrated.thresholds(n, layer);
        let layout = LayerLayout::new(&plan, &thresholds, calibrated.densities(n));
        let (hidden, ffn) = (spec.hidden, plan.ffn);
        let id = |param| ParamId::Layer(n, param);
        let part = |param, rows, inputs, by_input| Part { id: id(param), rows, inputs, by_input };
        let bias = |param| weights.vector(id(param)).map(Option::unwrap_or_default);
        let linear = |part, bias| Linear::pack(weights, format, part, bias);
        let head_norm = |param| match plan.qk_norm {
            Some(norm) => {
                let ids = (id(param), None);
                weights.norm(norm, ids, plan.heads.head_dim, Pointwise::Identity).map(Some)
            }
            None => Ok(None),
        };
        let width = plan.q_width + 2 * plan.kv_width;
        let qkv = part(LayerParam::Qkv, 0..width, hidden, layout.qkv);
        let o = part(LayerParam::O, 0..hidden, plan.q_width, layout.o);
        let first = part(LayerParam::Up, 0..ffn, hidden, layout.first);
        let up = part(LayerParam::Up, ffn..2 * ffn, hidden, layout.up);
        let down = part(LayerParam::Down, 0..hidden, ffn, true);
        let mut first_bias = bias(LayerParam::UpBias)?;
        let mut up_bias = match plan.gated && !first_bias.is_empty() {
            true => first_bias.split_off(ffn),
            false => Vec::new(),
        };
        let (up, neurons) = match (plan.gated, layout.up) {
            (true, false) => (None, weights.pack(format, &[up, down])?),
            (true, true) => {
                let bias = std::mem::take(&mut up_bias);
                (Some(linear(up, bias)?), weights.pack(format, &[down])?)
            }
            (false, _) => (None, weights.pack(format, &[down])?),
        };
        let attention_ids = (id(LayerParam::AttnNorm), Some(id(LayerParam::AttnNormBias)));
        let mlp_ids = (id(LayerParam::MlpNorm), Some(id(LayerParam::MlpNormBias)));
        let mlp_norm = match layer.shares_norm() {
            true => None,
            false => Some(weights.norm(plan.norm, mlp_ids, hidden, plan.up_in)?),
        };
        Ok(PackedLayer {
            thresholds,
            attention_norm: weights.norm(plan.norm, attention_ids, hidden, plan.qkv_in)?,
            mlp_norm,
            q_norm: head_norm(LayerParam::QNorm)?,
            k_norm: head_norm(LayerParam::KNorm)?,
            qkv: linear(qkv, bias(LayerParam::QkvBias)?)?,
            o: linear(o, bias(LayerParam::OBias)?)?,
            first: linear(first, first_bias)?,
            up,
            neurons,
            up_bias,
            down_bias: bias(LayerParam::DownBias)?,
            plan,
        })
    }

    /// The rows of `up` by neuron; `None` where a plain MLP has none, or where they are stored by input.
    pub fn up_rows(&self) -> Option<Rows<'_>> {
        (self.plan.gated && self.up.is_none()).then(|| self.neurons.part(0))
    }

    /// The rows of `down` by neuron.
    pub fn down_rows(&self) -> Rows<'_> {
        self.neurons.part(usize::from(self.plan.gated && self.up.is_none()))
    }

    fn widest(&self) -> usize {
        padded(self.qkv.outputs.max(self.first.outputs))
    }
}
