//! Weights from memory into files: the weight map read the other way.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Tensor;
use half::{bf16, f16};
use relufy_ops::buffer;
use relufy_spec::{DecoderSpec, WeightMap, WeightRow};
use safetensors::{Dtype, View};

use super::source::StoredDtype;
use super::staged::set_mode;
use crate::params::Params;
use crate::{Error, Result};

/// A file of weights holds at most this many bytes; Hugging Face's own limit.
const SHARD_BYTES: usize = 5_000_000_000;

/// Writes the weights of `params` under the checkpoint names of `map`: one
/// `model.safetensors`, or shards of 5 GB with an index. `dir` exists and is private to
/// the caller (see [`super::StagedDir`]).
///
/// # Errors
/// A full disk, and whatever else the system says.
pub fn save_weights(
    dir: &Path,
    spec: &DecoderSpec,
    params: &Params,
    map: &WeightMap,
    dtype: StoredDtype,
) -> Result<()> {
    let mut shards: Vec<Vec<&WeightRow>> = vec![Vec::new()];
    let mut filled = 0;
    for row in &map.rows {
        let bytes = stored_shape(spec, row).iter().product::<usize>() * dtype.size();
        if filled > 0 && filled + bytes > SHARD_BYTES {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(row);
        }
    }
    if let [only] = shards.as_slice() {
        return save_file(&dir.join("model.safetensors"), spec, params, only, dtype);
    }
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for (n, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", n + 1, shards.len());
        save_file(&dir.join(&name), spec, params, shard, dtype)?;
        for row in shard {
            weight_map.insert(tensor_name(row).to_owned(), name.clone());
            total_size += stored_shape(spec, row).iter().product::<usize>() * dtype.size();
        }
    }
    let index =
        serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    let path = dir.join("model.safetensors.index.json");
    std::fs::write(&path, format!("{index:#}\n")).map_err(Error::io(&path))
}

fn save_file(
    path: &Path,
    spec: &DecoderSpec,
    params: &Params,
    rows: &[&WeightRow],
    dtype: StoredDtype,
) -> Result<()> {
    let failed = RefCell::new(None);
    let view = |row| RowView::new(spec, params, row, dtype, &failed);
    let views = rows
        .iter()
        .map(|row| Ok((tensor_name(row).to_owned(), view(row)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    if let Some(error) = failed.take() {
        return Err(error.into());
    }
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => {
            Error::Io { path: path.to_owned(), source }
        }
        other => Error::Damaged { path: path.to_owned(), why: other.to_string() },
    })?;
    // It was a temporary file, which nobody else may read.
    set_mode(path, 0o644)
}

/// The name that a row is saved under.
fn tensor_name(row: &WeightRow) -> &str {
    row.names.first().map_or("", String::as_str)
}

/// The shape of a row's tensor in its file.
pub(super) fn stored_shape(spec: &DecoderSpec, row: &WeightRow) -> Vec<usize> {
    let shapes: Vec<Vec<usize>> = row.slots.iter().map(|slot| spec.shape(*slot)).collect();
    let rows = shapes.iter().filter_map(|shape| shape.first()).sum();
    match shapes.first().and_then(|shape| shape.get(1)) {
        Some(width) if row.transposed => vec![*width, rows],
        Some(width) => vec![rows, *width],
        None => vec![rows],
    }
}

/// Gathers one checkpoint tensor, in its stored shape, from tensors laid out as `params`:
/// the weights themselves, or their gradients.
///
/// # Errors
/// A slot that `lookup` does not have.
pub fn checkpoint_tensor(
    spec: &DecoderSpec,
    params: &Params,
    row: &WeightRow,
    lookup: impl Fn(crate::ParamId) -> Option<Tensor>,
) -> Result<(Vec<usize>, Vec<f32>)> {
    let shape = stored_shape(spec, row);
    let gather = Gather::new(spec, params, row)?;
    let tensor = lookup(gather.id)
        .ok_or_else(|| Error::Invalid(format!("no values for `{}`", tensor_name(row))))?;
    let mut chosen = Vec::with_capacity(shape.iter().product());
    gather.for_each(&buffer::to_host(&tensor)?, |value| chosen.push(value));
    Ok((shape, chosen))
}

/// Which elements of a parameter a stored tensor holds, in the stored order.
struct Gather {
    id: crate::ParamId,
    places: Vec<usize>,
    width: usize,
    transposed: bool,
}

impl Gather {
    fn new(spec: &DecoderSpec, params: &Params, row: &WeightRow) -> Result<Gather> {
        let nowhere = || Error::Invalid(format!("no parameter holds `{}`", tensor_name(row)));
        let first = row.slots.first().ok_or_else(nowhere)?;
        let param = params
            .iter()
            .find(|param| param.parts.iter().any(|part| part.slot == *first))
            .ok_or_else(nowhere)?;
        let mut counts = Vec::new();
        let mut starts = Vec::new();
        for slot in &row.slots {
            let part = param.parts.iter().find(|part| part.slot == *slot).ok_or_else(nowhere)?;
            counts.push(part.rows.len());
            starts.push(part.rows.start);
        }
        let places = row.row_order(&counts).into_iter().map(|(slot, r)| starts[slot] + r).collect();
        let width = spec.shape(*first).get(1).copied().unwrap_or(1);
        Ok(Gather { id: param.id, places, width, transposed: row.transposed })
    }

    /// Visits the chosen values of a parameter in the stored order.
    fn for_each(&self, values: &[f32], mut visit: impl FnMut(f32)) {
        let width = self.width;
        if self.transposed {
            for column in 0..width {
                for place in &self.places {
                    visit(values[place * width + column]);
                }
            }
        } else {
            for place in &self.places {
                values[place * width..(place + 1) * width].iter().copied().for_each(&mut visit);
            }
        }
    }
}

/// One tensor on its way into a file: fetched from its device, gathered and converted only when it
/// is written.
struct RowView<'a> {
    gather: Gather,
    tensor: &'a Tensor,
    shape: Vec<usize>,
    dtype: StoredDtype,
    /// Why a tensor could not be fetched: writing a file has no way to say so.
    failed: &'a RefCell<Option<relufy_ops::Error>>,
}

impl<'a> RowView<'a> {
    fn new(
        spec: &DecoderSpec,
        params: &'a Params,
        row: &WeightRow,
        dtype: StoredDtype,
        failed: &'a RefCell<Option<relufy_ops::Error>>,
    ) -> Result<RowView<'a>> {
        let gather = Gather::new(spec, params, row)?;
        let tensor = params
            .get(gather.id)
            .ok_or_else(|| Error::Invalid(format!("no parameter {:?}", gather.id)))?;
        Ok(RowView { gather, tensor, shape: stored_shape(spec, row), dtype, failed })
    }

    fn encode<const N: usize>(&self, encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.data_len());
        match buffer::to_host(self.tensor) {
            Ok(values) => self.gather.for_each(&values, |value| bytes.extend(encode(value))),
            Err(error) => {
                bytes.resize(self.data_len(), 0);
                self.failed.borrow_mut().get_or_insert(error);
            }
        }
        bytes
    }
}

impl View for RowView<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::F16 => Dtype::F16,
            StoredDtype::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match self.dtype {
            StoredDtype::F32 => self.encode(f32::to_le_bytes),
            StoredDtype::F16 => self.encode(|value| f16::from_f32(value).to_le_bytes()),
            StoredDtype::Bf16 => self.encode(|value| bf16::from_f32(value).to_le_bytes()),
        })
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}
