//! The weights in memory, fused as the arithmetic wants them: queries, keys and values are
//! one matrix, and so are gate and up.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use relufy_ops::buffer;
use relufy_spec::{DecoderSpec, LayerSlot, NormKind, Slot, WeightMap};

use crate::Result;

/// Names a parameter of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParamId {
    /// Token embedding, and the head where that is tied: `[vocab, hidden]`.
    Embed,
    /// Learned positions.
    Positions,
    /// A parameter of layer `n`.
    Layer(usize, LayerParam),
    /// Weight of the norm before the head.
    FinalNorm,
    /// Its bias.
    FinalNormBias,
    /// Untied head `[vocab, hidden]`.
    Head,
    /// Its bias.
    HeadBias,
}

/// A parameter of one layer. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // each names a matrix or vector of the standard block
pub enum LayerParam {
    AttnNorm,
    AttnNormBias,
    /// Rows of queries, then keys, then values.
    Qkv,
    QkvBias,
    QNorm,
    KNorm,
    O,
    OBias,
    MlpNorm,
    MlpNormBias,
    /// Rows of the gate, where there is one, then of up.
    Up,
    UpBias,
    Down,
    DownBias,
}

impl ParamId {
    /// The parameter that holds a slot.
    pub fn of(slot: Slot) -> ParamId {
        use LayerSlot as S;
        match slot {
            Slot::Embed => ParamId::Embed,
            Slot::Positions => ParamId::Positions,
            Slot::FinalNorm => ParamId::FinalNorm,
            Slot::FinalNormBias => ParamId::FinalNormBias,
            Slot::Head => ParamId::Head,
            Slot::HeadBias => ParamId::HeadBias,
            Slot::Layer(n, slot) => ParamId::Layer(
                n,
                match slot {
                    S::AttnNorm => LayerParam::AttnNorm,
                    S::AttnNormBias => LayerParam::AttnNormBias,
                    S::Q | S::K | S::V => LayerParam::Qkv,
                    S::QBias | S::KBias | S::VBias => LayerParam::QkvBias,
                    S::QNorm => LayerParam::QNorm,
                    S::KNorm => LayerParam::KNorm,
                    S::O => LayerParam::O,
                    S::OBias => LayerParam::OBias,
                    S::MlpNorm => LayerParam::MlpNorm,
                    S::MlpNormBias => LayerParam::MlpNormBias,
                    S::Gate | S::Up => LayerParam::Up,
                    S::GateBias | S::UpBias => LayerParam::UpBias,
                    S::Down => LayerParam::Down,
                    S::DownBias => LayerParam::DownBias,
                },
            ),
        }
    }
}

/// The rows of a parameter that one slot fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The slot.
    pub slot: Slot,
    /// Its rows.
    pub rows: Range<usize>,
}

/// One parameter. Its tensor may be changed in place (`relufy_ops::buffer`).
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name.
    pub id: ParamId,
    /// Its values, f32 on the CPU.
    pub tensor: Tensor,
    /// Which rows belong to which slot.
    pub parts: Vec<Part>,
}

impl Param {
    /// Whether it is a matrix; vectors (norms, biases) take no weight decay.
    pub fn is_matrix(&self) -> bool {
        self.tensor.rank() == 2
    }
}

/// Shape and parts of a parameter that has no values yet.
pub(crate) struct ParamLayout {
    pub id: ParamId,
    pub shape: Vec<usize>,
    pub parts: Vec<Part>,
}

impl ParamLayout {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn with_values(self, values: Vec<f32>, device: &Device) -> Result<Param> {
        let tensor = buffer::from_vec(values, self.shape, device)?;
        Ok(Param { id: self.id, tensor, parts: self.parts })
    }
}

/// The parameters of a decoder, in the order a token meets them.
pub(crate) fn empty_layout(spec: &DecoderSpec) -> Vec<ParamLayout> {
    let mut layouts: Vec<ParamLayout> = Vec::new();
    // Slots of one parameter are not all neighbours (Q K V QBias KBias VBias).
    for slot in spec.slots() {
        let id = ParamId::of(slot);
        let shape = spec.shape(slot);
        let rows = shape.first().copied().unwrap_or(0);
        match layouts.iter_mut().rev().find(|layout| layout.id == id) {
            Some(layout) => {
                let start = layout.shape[0];
                layout.shape[0] += rows;
                layout.parts.push(Part { slot, rows: start..start + rows });
            }
            None => {
                layouts.push(ParamLayout { id, shape, parts: vec![Part { slot, rows: 0..rows }] })
            }
        }
    }
    layouts
}

/// How random weights are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Init {
    /// Standard deviation of every matrix (Hugging Face's `initializer_range`).
    pub std: f64,
    /// Scales the matrices that write to the residual stream by `1/sqrt(2 layers)`, as GPT-2 does.
    pub scale_residual: bool,
    /// Seed; every parameter has a stream of its own.
    pub seed: u64,
}

impl Default for Init {
    fn default() -> Init {
        Init { std: 0.02, scale_residual: true, seed: 0 }
    }
}

/// Every parameter of a decoder.
#[derive(Clone, Debug)]
pub struct Params {
    list: Vec<Param>,
    index: HashMap<ParamId, usize>,
}

impl Params {
    pub(crate) fn from_list(list: Vec<Param>) -> Params {
        let index = list.iter().enumerate().map(|(n, param)| (param.id, n)).collect();
        Params { list, index }
    }

    /// Random weights: matrices normal, norm weights one, biases zero.
    ///
    /// # Errors
    /// The device has no room.
    pub fn random(spec: &DecoderSpec, init: &Init, device: &Device) -> Result<Params> {
        let params = empty_layout(spec)
            .into_iter()
            .enumerate()
            .map(|(n, layout)| {
                let values = random_values(spec, init, n as u64, &layout);
                layout.with_values(values, device)
            })
            .collect::<Result<_>>()?;
        Ok(Params::from_list(params))
    }

    /// The parameters, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Param> {
        self.list.iter()
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The values of a parameter, if the decoder has it.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.index_of(id).map(|n| &self.list[n].tensor)
    }

    /// The place of a parameter in [`Params::iter`].
    pub fn index_of(&self, id: ParamId) -> Option<usize> {
        self.index.get(&id).copied()
    }

    /// For each checkpoint tensor the parameter that holds it and its rows there: what name
    /// patterns (freezing) are matched against.
    pub fn checkpoint_names(&self, map: &WeightMap) -> Vec<(String, ParamId, Vec<Range<usize>>)> {
        map.rows
            .iter()
            .filter_map(|row| {
                let id = ParamId::of(*row.slots.first()?);
                let param = &self.list[self.index_of(id)?];
                let rows = param
                    .parts
                    .iter()
                    .filter(|part| row.slots.contains(&part.slot))
                    .map(|part| part.rows.clone())
                    .collect();
                Some((row.names.first()?.clone(), id, rows))
            })
            .collect()
    }
}

fn random_values(spec: &DecoderSpec, init: &Init, stream: u64, layout: &ParamLayout) -> Vec<f32> {
    let n = layout.elements();
    match layout.shape.as_slice() {
        [_, _] => {
            let mut rng = ChaCha8Rng::seed_from_u64(init.seed);
            rng.set_stream(stream);
            let writes_residual = matches!(
                layout.id,
                ParamId::Layer(_, LayerParam::O) | ParamId::Layer(_, LayerParam::Down)
            );
            let scale = if writes_residual && init.scale_residual {
                init.std / (2.0 * spec.layers.len() as f64).sqrt()
            } else {
                init.std
            };
            let mut values: Vec<f32> = Vec::with_capacity(n + 1);
            while values.len() < n {
                // Box-Muller; 1 - u keeps the logarithm finite.
                let (u, v): (f64, f64) = (rng.random(), rng.random());
                let radius = (-2.0 * (1.0 - u).ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
                values.push((scale * radius * cos) as f32);
                values.push((scale * radius * sin) as f32);
            }
            values.truncate(n);
            values
        }
        _ => vec![neutral(spec, layout.id); n],
    }
}

/// The value with which a norm or bias changes nothing.
fn neutral(spec: &DecoderSpec, id: ParamId) -> f32 {
    let kind = match id {
        ParamId::FinalNorm => Some(spec.final_norm.kind),
        ParamId::Layer(n, LayerParam::AttnNorm | LayerParam::MlpNorm) => {
            spec.layers.get(n).map(|layer| layer.norm.kind)
        }
        ParamId::Layer(n, LayerParam::QNorm | LayerParam::KNorm) => {
            spec.layers.get(n).and_then(|layer| layer.attention.qk_norm).map(|norm| norm.kind)
        }
        _ => None,
    };
    match kind {
        None | Some(NormKind::Rms { unit_offset: true }) => 0.0,
        Some(_) => 1.0,
    }
}
