//! The weights in memory, fused as the arithmetic wants them: queries, keys and values are
//! one matrix, and so are gate and up.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
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

impl LayerParam {
    /// All of them, in the order a token meets them.
    pub const ALL: [LayerParam; 14] = {
        use LayerParam::*;
        [
            AttnNorm,
            AttnNormBias,
            Qkv,
            QkvBias,
            QNorm,
            KNorm,
            O,
            OBias,
            MlpNorm,
            MlpNormBias,
            Up,
            UpBias,
            Down,
            DownBias,
        ]
    };
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
    /// Its values: f32, or bf16 on a GPU.
    pub tensor: Tensor,
    /// Which rows belong to which slot.
    pub parts: Vec<Part>,
}

impl Param {
    /// Whether it is a matrix; vectors (norms, biases) take no weight decay.
    pub fn is_matrix(&self) -> bool {
        self.tensor.rank() == 2
    }

    /// The same parameter in another type; nothing is copied if it has that type.
    pub(crate) fn cast(self, dtype: DType) -> Result<Param> {
        if self.tensor.dtype() == dtype {
            return Ok(self);
        }
        Ok(Param { tensor: buffer::cast(&self.tensor, dtype)?, ..self })
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
        let tensor = buffer::from_vec(values, self.shape.clone(), device)?;
        Ok(self.with_tensor(tensor))
    }

    fn with_tensor(self, tensor: Tensor) -> Param {
        Param { id: self.id, tensor, parts: self.parts }
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

/// The f32 values of parameters that are trained while rounded ones are in use.
#[derive(Clone, Debug, Default)]
pub struct Masters(HashMap<ParamId, Tensor>);

impl Masters {
    /// The f32 values of a parameter; `None` where those in use are all there is.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.0.get(&id)
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

    /// Random weights in f32: matrices normal, norm weights one, biases zero.
    ///
    /// On the CPU the numbers are the seed's on every machine. A GPU draws its own.
    ///
    /// # Errors
    /// The device has no room.
    pub fn random(spec: &DecoderSpec, init: &Init, device: &Device) -> Result<Params> {
        Params::random_as(spec, init, device, DType::F32)
    }

    /// As [`Params::random`], each rounded to `dtype` as soon as it is drawn.
    ///
    /// # Errors
    /// As [`Params::random`]; a type that the device does not compute in.
    pub fn random_as(
        spec: &DecoderSpec,
        init: &Init,
        device: &Device,
        dtype: DType,
    ) -> Result<Params> {
        if !device.is_cpu() {
            device.set_seed(init.seed)?;
        }
        let params = empty_layout(spec)
            .into_iter()
            .enumerate()
            .map(|(n, layout)| {
                let param = match (device, layout.shape.as_slice()) {
                    (Device::Cpu, _) | (_, []) | (_, [_]) => {
                        let values = random_values(spec, init, n as u64, &layout);
                        layout.with_values(values, device)?
                    }
                    (_, shape) => {
                        let std = deviation(spec, init, layout.id) as f32;
                        let tensor = Tensor::randn(0f32, std, shape, device)?;
                        layout.with_tensor(tensor)
                    }
                };
                param.cast(dtype)
            })
            .collect::<Result<_>>()?;
        Ok(Params::from_list(params))
    }

    /// The weights in `dtype`, and the f32 values of those that `trained` names: none where `dtype`
    /// is f32, because these are then one and the same. The others' f32 values are let go.
    ///
    /// # Errors
    /// The device has no room, or does not compute in `dtype`.
    pub fn into_use(
        self,
        dtype: DType,
        trained: impl Fn(ParamId) -> bool,
    ) -> Result<(Params, Masters)> {
        if dtype == DType::F32 {
            return Ok((self, Masters::default()));
        }
        let mut masters = HashMap::new();
        let list = self
            .list
            .into_iter()
            .map(|param| {
                if trained(param.id) {
                    masters.insert(param.id, param.tensor.clone());
                }
                param.cast(dtype)
            })
            .collect::<Result<_>>()?;
        Ok((Params::from_list(list), Masters(masters)))
    }

    /// The same parameters, with the f32 values where there are masters: what is saved.
    pub fn with_masters<'a>(&self, masters: impl Fn(ParamId) -> Option<&'a Tensor>) -> Params {
        let list = self.list.iter().cloned().map(|param| match masters(param.id) {
            Some(master) => Param { tensor: master.clone(), ..param },
            None => param,
        });
        Params::from_list(list.collect())
    }

    /// The type of the weights; f32 where there are none.
    pub fn dtype(&self) -> DType {
        self.list.first().map_or(DType::F32, |param| param.tensor.dtype())
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
            let scale = deviation(spec, init, layout.id);
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

/// The standard deviation of a matrix.
fn deviation(spec: &DecoderSpec, init: &Init, id: ParamId) -> f64 {
    let writes_residual =
        matches!(id, ParamId::Layer(_, LayerParam::O) | ParamId::Layer(_, LayerParam::Down));
    match writes_residual && init.scale_residual {
        true => init.std / (2.0 * spec.layers.len() as f64).sqrt(),
        false => init.std,
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
