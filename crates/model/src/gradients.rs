//! One gradient buffer a trainable parameter, written in place by the backward pass; or one for all
//! layers, where each layer's gradients are used before the next one's are written.

use std::cell::Cell;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use candle_core::{DType, Tensor};
use relufy_ops::buffer::{self, Accum};
use relufy_ops::reduce;
use relufy_spec::WeightMap;

use crate::{LayerParam, Param, ParamId, Params, Result};

/// Which rows of which parameters are trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainable {
    /// For each parameter, in the order of [`Params::iter`], disjoint row ranges.
    rows: Vec<Vec<Range<usize>>>,
}

impl Trainable {
    /// Everything.
    pub fn all(params: &Params) -> Trainable {
        let whole = |param: &Param| {
            std::iter::once(0..param.tensor.dims().first().copied().unwrap_or(0)).collect()
        };
        Trainable { rows: params.iter().map(whole).collect() }
    }

    /// The checkpoint tensors whose name `wanted` accepts.
    pub fn by_name(params: &Params, map: &WeightMap, wanted: impl Fn(&str) -> bool) -> Trainable {
        let mut rows = vec![Vec::new(); params.len()];
        for (name, id, ranges) in params.checkpoint_names(map) {
            if let (true, Some(n)) = (wanted(&name), params.index_of(id)) {
                rows[n].extend(ranges);
            }
        }
        for ranges in &mut rows {
            merge(ranges);
        }
        Trainable { rows }
    }

    /// The parameters with trained rows, and these rows.
    pub fn iter<'a>(
        &'a self,
        params: &'a Params,
    ) -> impl Iterator<Item = (&'a Param, &'a [Range<usize>])> {
        let all = params.iter().zip(&self.rows).map(|(param, rows)| (param, rows.as_slice()));
        all.filter(|(_, rows)| !rows.is_empty())
    }

    /// Whether any row of a parameter is trained.
    pub fn wants(&self, params: &Params, id: ParamId) -> bool {
        params.index_of(id).is_some_and(|n| !self.rows[n].is_empty())
    }

    /// How many numbers the parameters have of which rows are trained: what their masters and
    /// moments take.
    pub fn held(&self, params: &Params) -> usize {
        self.iter(params).map(|(param, _)| param.tensor.elem_count()).sum()
    }

    /// How many numbers are trained.
    pub fn count(&self, params: &Params) -> usize {
        params
            .iter()
            .zip(&self.rows)
            .map(|(param, rows)| {
                let all = param.tensor.dims().first().copied().unwrap_or(0).max(1);
                let chosen: usize = rows.iter().map(ExactSizeIterator::len).sum();
                param.tensor.elem_count() / all * chosen
            })
            .sum()
    }
}

/// Joins ranges that touch, so that a whole fused matrix is one product.
fn merge(ranges: &mut Vec<Range<usize>>) {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges.drain(..) {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    *ranges = joined;
}

/// Whose gradient a buffer holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Buffers {
    /// Each parameter has its own.
    #[default]
    Own,
    /// Parameters of one kind and shape share theirs over all layers, and so do the head and the
    /// embedding: for whoever uses gradients as soon as they are final.
    Shared,
}

/// Parameters that may share a buffer: their gradients are final at different times.
#[derive(PartialEq, Eq, Hash)]
enum Kind {
    /// The head's is final before the first layer's, the embedding's after the last.
    Vocabulary,
    Layer(LayerParam),
}

impl Kind {
    fn of(id: ParamId) -> Option<Kind> {
        match id {
            ParamId::Layer(_, param) => Some(Kind::Layer(param)),
            ParamId::Head | ParamId::Embed => Some(Kind::Vocabulary),
            _ => None,
        }
    }
}

/// The gradients of one optimizer step.
pub struct Gradients {
    slots: Vec<GradientSlot>,
    ids: Vec<ParamId>,
    index: HashMap<ParamId, usize>,
}

struct GradientSlot {
    /// `None` for a frozen parameter.
    tensor: Option<Tensor>,
    rows: Vec<Range<usize>>,
    written: Cell<bool>,
}

/// A gradient that the backward pass is about to write.
pub(crate) struct Target<'a> {
    pub tensor: &'a Tensor,
    pub rows: &'a [Range<usize>],
    pub accum: Accum,
}

impl Gradients {
    /// Buffers of the parameters' type for what is trainable; frozen parameters have none.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(params: &Params, trainable: &Trainable) -> Result<Gradients> {
        Gradients::held(params, trainable, params.dtype(), Buffers::Own)
    }

    /// As [`Gradients::new`], with buffers of another type or fewer of them.
    ///
    /// # Errors
    /// The device has no room.
    pub fn held(
        params: &Params,
        trainable: &Trainable,
        dtype: DType,
        buffers: Buffers,
    ) -> Result<Gradients> {
        let mut shared: HashMap<(Kind, Vec<usize>), Tensor> = HashMap::new();
        let mut buffer = |param: &Param| -> Result<Tensor> {
            let shape = param.tensor.dims().to_vec();
            let make = || Tensor::zeros(shape.as_slice(), dtype, param.tensor.device());
            let (Some(kind), Buffers::Shared) = (Kind::of(param.id), buffers) else {
                return Ok(make()?);
            };
            Ok(match shared.entry((kind, shape.clone())) {
                Entry::Occupied(there) => there.get().clone(),
                Entry::Vacant(new) => new.insert(make()?).clone(),
            })
        };
        let slots = params
            .iter()
            .zip(&trainable.rows)
            .map(|(param, rows)| {
                let frozen = rows.is_empty();
                let tensor = if frozen { None } else { Some(buffer(param)?) };
                Ok(GradientSlot { tensor, rows: rows.clone(), written: Cell::new(false) })
            })
            .collect::<Result<_>>()?;
        let ids: Vec<ParamId> = params.iter().map(|param| param.id).collect();
        let index = ids.iter().enumerate().map(|(n, id)| (*id, n)).collect();
        Ok(Gradients { slots, ids, index })
    }

    /// How many numbers the buffers of [`Gradients::held`] would have.
    pub fn buffer_elements(params: &Params, trainable: &Trainable, buffers: Buffers) -> usize {
        let mut seen = HashSet::new();
        let mut has_own = |param: &Param| match (Kind::of(param.id), buffers) {
            (Some(kind), Buffers::Shared) => seen.insert((kind, param.tensor.dims().to_vec())),
            _ => true,
        };
        let trained = trainable.iter(params).map(|(param, _)| param);
        trained.filter(|param| has_own(param)).map(|param| param.tensor.elem_count()).sum()
    }

    /// Starts an optimizer step: the next write to each buffer replaces what it holds.
    pub fn begin_step(&mut self) {
        self.slots.iter().for_each(|slot| slot.written.set(false));
    }

    /// Fills every buffer with NaN, so that [`Gradients::problems`] sees what stayed unwritten.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn poison(&mut self) -> Result<()> {
        self.poison_these(&self.ids)
    }

    /// As [`Gradients::poison`], only these parameters' buffers.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn poison_these(&self, ids: &[ParamId]) -> Result<()> {
        for tensor in ids.iter().filter_map(|id| self.get(*id)) {
            reduce::fill(tensor, f32::NAN)?;
        }
        Ok(())
    }

    /// Checkpoint tensors whose gradient was not written, is not finite, or is all zero,
    /// each with the reason.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn problems(
        &self,
        params: &Params,
        map: &WeightMap,
    ) -> Result<Vec<(String, &'static str)>> {
        self.problems_among(params, map, |_| true)
    }

    /// As [`Gradients::problems`], of the parameters that `among` names.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn problems_among(
        &self,
        params: &Params,
        map: &WeightMap,
        among: impl Fn(ParamId) -> bool,
    ) -> Result<Vec<(String, &'static str)>> {
        let mut problems = Vec::new();
        for (name, id, ranges) in params.checkpoint_names(map) {
            let Some(slot) = self.slot(id).filter(|_| among(id)) else { continue };
            let Some(tensor) = &slot.tensor else { continue };
            let trained = |range: &Range<usize>| {
                slot.rows.iter().any(|rows| rows.start <= range.start && range.end <= rows.end)
            };
            let mut chosen = ranges.iter().filter(|range| trained(range)).peekable();
            if chosen.peek().is_none() {
                continue;
            }
            let mut zero = true;
            let mut finite = true;
            for range in chosen {
                let part = tensor.narrow(0, range.start, range.len())?;
                finite &= reduce::all_finite(&part)?;
                zero &= reduce::count_nonzero(&part)? == 0;
            }
            if !slot.written.get() {
                problems.push((name, "was not written"));
            } else if !finite {
                problems.push((name, "is not finite"));
            } else if zero {
                problems.push((name, "is all zero"));
            }
        }
        Ok(problems)
    }

    /// Every gradient with its trained rows.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Tensor, &[Range<usize>])> {
        self.ids.iter().zip(&self.slots).filter_map(|(id, slot)| {
            slot.tensor.as_ref().map(|tensor| (*id, tensor, slot.rows.as_slice()))
        })
    }

    /// The gradient of a parameter; `None` where it is frozen.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.slot(id).and_then(|slot| slot.tensor.as_ref())
    }

    /// The L2 norm over everything that is trained. The order of the sum is fixed.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn global_norm(&self) -> Result<f64> {
        Ok(self.sum_of_squares(&self.ids)?.sqrt())
    }

    /// The sum of squares over the trained rows of these parameters.
    ///
    /// # Errors
    /// A device without the kernel.
    pub fn sum_of_squares(&self, ids: &[ParamId]) -> Result<f64> {
        let mut parts = Vec::new();
        for slot in ids.iter().filter_map(|id| self.slot(*id)) {
            let Some(tensor) = &slot.tensor else { continue };
            for range in &slot.rows {
                parts.push(tensor.narrow(0, range.start, range.len())?);
            }
        }
        let parts: Vec<&Tensor> = parts.iter().collect();
        Ok(reduce::sum_of_squares_of(&parts)?)
    }

    /// Where and how to write the gradient of a parameter now; marks it as written.
    pub(crate) fn target(&self, id: ParamId) -> Option<Target<'_>> {
        let slot = self.slot(id)?;
        let tensor = slot.tensor.as_ref()?;
        let accum = if slot.written.replace(true) { Accum::Add } else { Accum::Overwrite };
        Some(Target { tensor, rows: &slot.rows, accum })
    }

    /// Whether a parameter is trained at all.
    pub(crate) fn wants(&self, id: ParamId) -> bool {
        self.slot(id).is_some_and(|slot| slot.tensor.is_some())
    }

    /// The lowest layer with a trained parameter; `Some(0)` if the embedding is trained.
    pub(crate) fn lowest_layer(&self) -> Option<usize> {
        self.iter()
            .filter_map(|(id, ..)| match id {
                ParamId::Embed | ParamId::Positions => Some(0),
                ParamId::Layer(n, _) => Some(n),
                _ => None,
            })
            .min()
    }

    fn slot(&self, id: ParamId) -> Option<&GradientSlot> {
        self.index.get(&id).map(|n| &self.slots[*n])
    }
}

impl Target<'_> {
    /// Calls `write` for each trained row range. Frozen rows of a buffer keep zero.
    pub fn for_rows(
        &self,
        mut write: impl FnMut(Range<usize>, buffer::Dest<'_>) -> relufy_ops::Result<()>,
    ) -> Result<()> {
        for rows in self.rows {
            write(rows.clone(), (self.tensor, self.accum))?;
        }
        Ok(())
    }
}
