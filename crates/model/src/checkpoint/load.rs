//! Weights from files into memory, a parameter at a time: each stored row is converted once,
//! straight to its place in the fused parameter.

use candle_core::{DType, Device};
use half::{bf16, f16};
use rayon::prelude::*;
use relufy_spec::WeightRow;

use super::Checkpoint;
use super::source::{Stored, StoredDtype};
use crate::params::{Params, empty_layout};
use crate::{Error, Result};

/// Reads every weight of a checkpoint as `dtype`.
pub(super) fn load(checkpoint: &Checkpoint, device: &Device, dtype: DType) -> Result<Params> {
    let spec = &checkpoint.config.spec;
    let mut params = Vec::new();
    for layout in empty_layout(spec) {
        let mut buffer = vec![0f32; layout.elements()];
        for (row, name, stored) in checkpoint.bound_rows() {
            let Some(first) = row.slots.first() else { continue };
            if layout.parts.iter().any(|part| part.slot == *first) {
                let places = places(spec, row, &layout)?;
                fill(checkpoint, row, name, stored, &places, &mut buffer)?;
            }
        }
        params.push(layout.with_values(buffer, device)?.cast(dtype)?);
    }
    Ok(Params::from_list(params))
}

/// The parameter row of each stored row.
fn places(
    spec: &relufy_spec::DecoderSpec,
    row: &WeightRow,
    layout: &crate::params::ParamLayout,
) -> Result<Vec<usize>> {
    let counts: Vec<usize> =
        row.slots.iter().map(|slot| spec.shape(*slot).first().copied().unwrap_or(0)).collect();
    let starts: Vec<usize> = row
        .slots
        .iter()
        .map(|slot| {
            layout
                .parts
                .iter()
                .find(|part| part.slot == *slot)
                .map(|part| part.rows.start)
                .ok_or_else(|| {
                    Error::Invalid(format!("the weight map fills {slot} from two parameters"))
                })
        })
        .collect::<Result<_>>()?;
    Ok(row.row_order(&counts).into_iter().map(|(slot, r)| starts[slot] + r).collect())
}

/// Converts one stored tensor into the rows `places` of a parameter.
fn fill(
    checkpoint: &Checkpoint,
    row: &WeightRow,
    name: &str,
    stored: &Stored,
    places: &[usize],
    buffer: &mut [f32],
) -> Result<()> {
    let bytes = checkpoint.source.bytes(name, stored)?;
    let Ok(dtype) = stored.dtype.clone() else { return Ok(()) };
    let width = stored.shape.iter().product::<usize>() / places.len().max(1);
    let rows = places.len();
    // Rows of a fused parameter that one tensor fills are disjoint: hand each its slice.
    let mut slices: Vec<Option<&mut [f32]>> = buffer.chunks_mut(width.max(1)).map(Some).collect();
    let targets: Vec<(usize, &mut [f32])> = places
        .iter()
        .enumerate()
        .filter_map(|(stored_row, place)| Some((stored_row, slices.get_mut(*place)?.take()?)))
        .collect();
    let bad = targets
        .into_par_iter()
        .map(|(r, target)| {
            let at =
                |column: usize| if row.transposed { column * rows + r } else { r * width + column };
            convert(&bytes, dtype, at, target)
        })
        .filter_map(|bad| bad)
        .min_by_key(|(element, _)| *element);
    match bad {
        None => Ok(()),
        Some((element, value)) => Err(Error::NonFinite {
            path: checkpoint.source.path_of(stored).to_owned(),
            tensor: name.to_owned(),
            element,
            value,
        }),
    }
}

/// Converts one row; returns the first element that is not finite.
fn convert(
    bytes: &[u8],
    dtype: StoredDtype,
    at: impl Fn(usize) -> usize,
    target: &mut [f32],
) -> Option<(usize, f32)> {
    let mut bad = None;
    for (column, value) in target.iter_mut().enumerate() {
        let element = at(column);
        let start = element * dtype.size();
        *value = match (dtype, &bytes[start..start + dtype.size()]) {
            (StoredDtype::F32, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]),
            (StoredDtype::F16, [a, b]) => f16::from_le_bytes([*a, *b]).to_f32(),
            (StoredDtype::Bf16, [a, b]) => bf16::from_le_bytes([*a, *b]).to_f32(),
            _ => f32::NAN, // a slice of another size: cannot be
        };
        if !value.is_finite() && bad.is_none() {
            bad = Some((element, *value));
        }
    }
    bad
}
