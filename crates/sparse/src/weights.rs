//! Where packed matrices come from: parameters, random numbers, or a file that was packed before.

use std::fmt;
use std::ops::Range;

use candle_core::{Device, Tensor};
use relufy_model::layer::NormPlan;
use relufy_model::{ParamId, Params};
use relufy_ops::buffer::{View, to_host, view};
use relufy_ops::norm::{Norm, RowNorm};
use relufy_ops::pointwise::Pointwise;

use crate::cache::PackedFile;
use crate::matrix::Matrix;
use crate::source::{Source, mix};
use crate::{Error, Format, Result};

/// What an engine is made of.
pub(crate) enum Weights<'a> {
    Params(&'a Params),
    Random(u64),
    File(&'a PackedFile),
}

/// One part of a packed matrix's rows: some rows of a parameter `[.., inputs]`.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub id: ParamId,
    pub rows: Range<usize>,
    pub inputs: usize,
    /// Whether the packed rows are its columns.
    pub by_input: bool,
}

impl Part {
    /// Packed rows and columns.
    fn shape(&self) -> (usize, usize) {
        let outputs = self.rows.len();
        if self.by_input { (self.inputs, outputs) } else { (outputs, self.inputs) }
    }
}

/// What a matrix is called in files: `Layer(0, Up)[100..200] by output, Layer(0, Down)[0..48] by input`.
pub(crate) struct PartsName<'a>(pub &'a [Part]);

impl fmt::Display for PartsName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, Part { id, rows, by_input, .. }) in self.0.iter().enumerate() {
            let between = if n == 0 { "" } else { ", " };
            let way = if *by_input { "input" } else { "output" };
            write!(f, "{between}{id:?}[{}..{}] by {way}", rows.start, rows.end)?;
        }
        Ok(())
    }
}

impl Weights<'_> {
    /// A matrix whose rows have these parts, which agree in their packed shape.
    pub fn pack(&self, format: Format, parts: &[Part]) -> Result<Matrix> {
        let (rows, cols) = parts.first().map_or((0, 0), Part::shape);
        let shape = (rows, cols, parts.len());
        let name = PartsName(parts).to_string();
        if let Weights::File(file) = self {
            return file.matrix(name, format, shape);
        }
        let values = parts.iter().map(|part| self.values(part.id)).collect::<Result<Vec<_>>>()?;
        let sources = parts.iter().zip(&values).map(|(part, values)| {
            let Part { id, rows, inputs, .. } = part;
            match values {
                Some(values) => Source::Values(&values[rows.start * inputs..rows.end * inputs]),
                None => Source::Random { seed: self.seed(&format!("{id:?} {rows:?}")), std: 0.02 },
            }
        });
        let sources: Vec<_> = sources.collect();
        Matrix::pack(name, format, shape, |n, rows, out| {
            let (part, source) = (&parts[n], &sources[n]);
            match part.by_input {
                true => source.columns(rows, part.inputs, out),
                false => source.rows(rows, part.inputs, out),
            }
        })
    }

    /// A parameter's values; `None` where they are random.
    fn values(&self, id: ParamId) -> Result<Option<View<'_>>> {
        match self {
            Weights::Params(params) => {
                let tensor = params.get(id).ok_or_else(|| missing(id))?;
                Ok(Some(view(tensor, "packing weights")?))
            }
            _ => Ok(None),
        }
    }

    /// The seed of a random matrix.
    fn seed(&self, name: &str) -> u64 {
        let seed = if let Weights::Random(seed) = self { *seed } else { 0 };
        name.bytes().fold(seed, |seed, byte| mix(seed ^ u64::from(byte)))
    }

    /// A bias; `None` where there is none.
    pub fn vector(&self, id: ParamId) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Weights::Params(params) => params.get(id).map(to_host).transpose()?,
            Weights::Random(_) => None,
            Weights::File(file) => file.vector(id)?,
        })
    }

    /// A norm over rows of `width` elements, with `post` fused.
    pub fn norm(
        &self,
        plan: NormPlan,
        (weight, bias): (ParamId, Option<ParamId>),
        width: usize,
        post: Pointwise,
    ) -> Result<RowNorm> {
        let tensor = |values: Vec<f32>| {
            let count = values.len();
            Tensor::from_vec(values, count, &Device::Cpu).map_err(relufy_ops::Error::from)
        };
        let gain = match (self, self.vector(weight)?) {
            (_, Some(gain)) => gain,
            (Weights::Random(_), None) => vec![1.0; width],
            _ => return Err(missing(weight)),
        };
        let bias = match bias {
            Some(bias) => self.vector(bias)?.map(tensor).transpose()?,
            None => None,
        };
        let weight = tensor(gain)?;
        let norm =
            Norm { kind: plan.kind, eps: plan.eps, weight: &weight, bias: bias.as_ref(), post };
        Ok(RowNorm::new(&norm)?)
    }
}

fn missing(id: ParamId) -> Error {
    Error::Decoder(format!("no parameter {id:?}"))
}
