//! Where the weights come from while they are packed: a decoder's parameters, or random numbers.

use std::ops::Range;

use candle_core::{Device, Tensor};
use relufy_model::layer::NormPlan;
use relufy_model::{ParamId, Params};
use relufy_ops::buffer::{from_vec, to_host};
use relufy_ops::decode::{Format, GpuMatrix, Norm};
use relufy_ops::norm::NormKind;

use crate::source::mix;
use crate::{Error, Result};

/// What is packed, and onto which GPU.
pub(super) enum Weights<'a> {
    Params(&'a Params, &'a Device),
    /// Matrices of a seed, norms one, biases zero: for measurements, where only the shape matters.
    Random(u64, &'a Device),
}

/// Which rows of a parameter `[.., inputs]` make a matrix.
pub(super) struct Part {
    pub id: ParamId,
    pub rows: Range<usize>,
    pub inputs: usize,
}

impl Weights<'_> {
    pub fn device(&self) -> &Device {
        match self {
            Weights::Params(_, device) | Weights::Random(_, device) => device,
        }
    }

    /// A matrix; `by_input` makes its columns the rows that are read or skipped.
    pub fn matrix(&self, part: Part, by_input: bool, format: Format) -> Result<GpuMatrix> {
        let Part { id, rows, inputs } = part;
        match self {
            Weights::Params(params, _) => {
                let tensor = params.get(id).ok_or_else(|| missing(id))?;
                let some = tensor.narrow(0, rows.start, rows.len());
                let some = some.map_err(relufy_ops::Error::from)?;
                Ok(GpuMatrix::pack(&some, by_input, format)?)
            }
            Weights::Random(seed, device) => {
                let seed = seed_of(*seed, id, &rows);
                let (rows, cols) = match by_input {
                    true => (inputs, rows.len()),
                    false => (rows.len(), inputs),
                };
                Ok(GpuMatrix::random(device, format, rows, cols, 0.02, seed)?)
            }
        }
    }

    /// A gate and its `up`, the two halves of the part's rows, by input and side by side.
    pub fn pairs(&self, part: Part, format: Format) -> Result<GpuMatrix> {
        let Part { id, rows, inputs } = part;
        let ffn = rows.len() / 2;
        match self {
            Weights::Params(params, _) => {
                let tensor = params.get(id).ok_or_else(|| missing(id))?;
                let half = |n: usize| tensor.narrow(0, rows.start + n * ffn, ffn);
                let halves = half(0).and_then(|gate| Ok((gate, half(1)?)));
                let (gate, up) = halves.map_err(relufy_ops::Error::from)?;
                Ok(GpuMatrix::pack_pairs(&gate, &up, format)?)
            }
            Weights::Random(seed, device) => {
                let columns = GpuMatrix::pair_columns(format, ffn);
                let seed = seed_of(*seed, id, &rows);
                Ok(GpuMatrix::random(device, format, inputs, columns, 0.02, seed)?)
            }
        }
    }

    /// A bias in f32, or some elements of one; `None` where there is none.
    pub fn vector(&self, id: ParamId, part: Range<usize>) -> Result<Option<Tensor>> {
        let Some(values) = self.values(id)? else { return Ok(None) };
        let some = values.get(part).ok_or_else(|| missing(id))?;
        Ok(Some(self.upload(some.to_vec())?))
    }

    /// A norm over `width` elements.
    pub fn norm(
        &self,
        plan: NormPlan,
        (weight, bias): (ParamId, Option<ParamId>),
        width: usize,
    ) -> Result<Norm> {
        let mut gain = match self {
            Weights::Params(..) => self.values(weight)?.ok_or_else(|| missing(weight))?,
            Weights::Random(..) => vec![1.0; width],
        };
        if let (Weights::Params(..), NormKind::Rms { unit_offset: true }) = (self, plan.kind) {
            gain.iter_mut().for_each(|gain| *gain += 1.0);
        }
        let bias = bias.map(|id| self.vector(id, 0..width)).transpose()?.flatten();
        let centred = plan.kind == NormKind::Layer;
        Ok(Norm { centred, eps: plan.eps, gain: self.upload(gain)?, bias })
    }

    /// A vector's values; `None` where the decoder has no such parameter.
    fn values(&self, id: ParamId) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Weights::Params(params, _) => params.get(id).map(to_host).transpose()?,
            Weights::Random(..) => None,
        })
    }

    fn upload(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Ok(from_vec(values, len, self.device())?)
    }
}

/// A matrix's own seed.
fn seed_of(seed: u64, id: ParamId, rows: &Range<usize>) -> u64 {
    let name = format!("{id:?} {rows:?}");
    name.bytes().fold(seed, |seed, byte| mix(seed ^ u64::from(byte)))
}

fn missing(id: ParamId) -> Error {
    Error::Decoder(format!("no parameter {id:?}"))
}
