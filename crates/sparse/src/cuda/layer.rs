//! One layer, packed: each matrix in the layout that its input asks for.

use candle_core::Tensor;
use relufy_model::layer::LayerPlan;
use relufy_model::{LayerParam, ParamId};
use relufy_ops::decode::{AttentionPlan, Format, GpuMatrix, Norm};
use relufy_ops::rope::{RopePairs, RopeTable};
use relufy_spec::DecoderSpec;

use super::layout::Layout;
use super::weights::{Part, Weights};
use crate::Result;

/// One layer.
pub(super) struct Layer {
    pub plan: LayerPlan,
    pub attention_norm: Norm,
    /// `None` where one norm is shared.
    pub mlp_norm: Option<Norm>,
    pub attention: AttentionPlan,
    pub qkv: Linear,
    pub o: Linear,
    pub mlp: Mlp,
}

/// An MLP, by what of it can be skipped.
pub(super) enum Mlp {
    /// Gated: of `up` and `down` only the rows of neurons whose gate is open.
    Neurons { gate: Linear, up: GpuMatrix, up_bias: Option<Tensor>, down: Linear },
    /// Gated: of the gate and `up` together only the rows of inputs that are not zero, of `down` as above.
    Pairs { pairs: GpuMatrix, biases: [Option<Tensor>; 2], down: Linear },
    /// Gated, with an activation that is never zero but by rounding: every row, gate and `up` in one
    /// pass.
    Whole { gate: Linear, up: GpuMatrix, up_bias: Option<Tensor>, down: Linear },
    /// Without a gate.
    Plain { up: Linear, down: Linear },
}

/// A projection.
pub(super) struct Linear {
    pub matrix: GpuMatrix,
    /// Rows are inputs, so that zeros among them are skipped; else rows are outputs.
    pub by_input: bool,
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Packs a projection.
    pub fn pack(
        weights: &Weights<'_>,
        part: Part,
        bias: Option<Tensor>,
        by_input: bool,
        format: Format,
    ) -> Result<Linear> {
        Ok(Linear { matrix: weights.matrix(part, by_input, format)?, by_input, bias })
    }

    pub fn outputs(&self) -> usize {
        if self.by_input { self.matrix.cols() } else { self.matrix.rows() }
    }
}

impl Layer {
    pub fn pack(
        spec: &DecoderSpec,
        n: usize,
        weights: &Weights<'_>,
        rope: Option<&(RopeTable, RopePairs)>,
        layout: Layout<'_>,
    ) -> Result<Layer> {
        let layer = &spec.layers[n];
        let plan = LayerPlan::new(layer, &spec.position);
        let hidden = spec.hidden;
        let id = |param| ParamId::Layer(n, param);
        let norm = |weight, bias| weights.norm(plan.norm, (id(weight), Some(id(bias))), hidden);
        let head_norm = |param| {
            let ids = (id(param), None);
            let norm = |plan_of| weights.norm(plan_of, ids, plan.heads.head_dim);
            plan.qk_norm.map(norm).transpose()
        };
        let norms = [head_norm(LayerParam::QNorm)?, head_norm(LayerParam::KNorm)?];
        let rope = rope.map(|(table, pairs)| (table, *pairs));
        let attention = AttentionPlan::new(weights.device(), &plan.heads, rope, norms)?;
        let mlp_norm = match layer.shares_norm() {
            true => None,
            false => Some(norm(LayerParam::MlpNorm, LayerParam::MlpNormBias)?),
        };
        let linear = |matrix, bias, (outputs, inputs), op| {
            let part = Part { id: id(matrix), rows: 0..outputs, inputs };
            let bias = weights.vector(id(bias), 0..outputs)?;
            Linear::pack(weights, part, bias, layout.skips(op), layout.format)
        };
        use LayerParam::{AttnNorm, AttnNormBias, O, OBias, Qkv, QkvBias};
        let width = plan.q_width + 2 * plan.kv_width;
        Ok(Layer {
            attention_norm: norm(AttnNorm, AttnNormBias)?,
            mlp_norm,
            attention,
            qkv: linear(Qkv, QkvBias, (width, hidden), plan.qkv_in)?,
            o: linear(O, OBias, (hidden, plan.q_width), plan.o_in)?,
            mlp: Mlp::pack(&plan, n, hidden, weights, layout)?,
            plan,
        })
    }

    /// Bytes of the packed matrices.
    pub fn bytes(&self) -> usize {
        let mlp = match &self.mlp {
            Mlp::Neurons { gate, up, down, .. } | Mlp::Whole { gate, up, down, .. } => {
                gate.matrix.bytes() + up.bytes() + down.matrix.bytes()
            }
            Mlp::Pairs { pairs, down, .. } => pairs.bytes() + down.matrix.bytes(),
            Mlp::Plain { up, down } => up.matrix.bytes() + down.matrix.bytes(),
        };
        self.qkv.matrix.bytes() + self.o.matrix.bytes() + mlp
    }
}

impl Mlp {
    fn pack(
        plan: &LayerPlan,
        n: usize,
        hidden: usize,
        weights: &Weights<'_>,
        layout: Layout<'_>,
    ) -> Result<Mlp> {
        let (id, ffn, format) = (|param| ParamId::Layer(n, param), plan.ffn, layout.format);
        let (up_id, down_id) = (id(LayerParam::Up), id(LayerParam::Down));
        let bias = |part| weights.vector(id(LayerParam::UpBias), part);
        let part = |rows| Part { id: up_id, rows, inputs: hidden };
        let zeros = layout.skips_neurons(plan);
        let down = {
            let part = Part { id: down_id, rows: 0..hidden, inputs: ffn };
            let bias = weights.vector(id(LayerParam::DownBias), 0..hidden)?;
            Linear::pack(weights, part, bias, zeros, format)?
        };
        if layout.up_by_input(n, plan, hidden) {
            let pairs = weights.pairs(part(0..2 * ffn), format)?;
            let biases = [bias(0..ffn)?, bias(ffn..2 * ffn)?];
            return Ok(Mlp::Pairs { pairs, biases, down });
        }
        // What says which neurons are active: the gate, or `up` where there is none.
        let first =
            Linear::pack(weights, part(0..ffn), bias(0..ffn)?, layout.skips(plan.up_in), format)?;
        if !plan.gated {
            return Ok(Mlp::Plain { up: first, down });
        }
        let up = weights.matrix(part(ffn..2 * ffn), false, format)?;
        let (gate, up_bias) = (first, bias(ffn..2 * ffn)?);
        Ok(match zeros || gate.by_input {
            true => Mlp::Neurons { gate, up, up_bias, down },
            false => Mlp::Whole { gate, up, up_bias, down },
        })
    }
}
