//! One gradient buffer a trainable parameter, written in place by the backward pass.

use std::cell::Cell;
use std::ops::Range;

use candle_core::Tensor;
use relufy_ops::buffer::{self, Accum};
use relufy_ops::reduce;
use relufy_spec::WeightMap;

use crate::{ParamId, Params, Result};

/// Which rows of which parameters are trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainable {
    /// For each parameter, in the order of [`Params::iter`], disjoint row ranges.
    rows: Vec<Vec<Range<usize>>>,
}

impl Trainable {
    /// Everything.
    pub fn all(params: &Params) -> Trainable {
        let whole = |param: &crate::Param| {
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

/// The gradients of one optimizer step.
pub struct Gradients {
    slots: Vec<GradientSlot>,
    ids: Vec<ParamId>,
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
    /// Buffers for what is trainable; frozen parameters have none.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(params: &Params, trainable: &Trainable) -> Result<Gradients> {
        let slots = params
            .iter()
            .zip(&trainable.rows)
            .map(|(param, rows)| {
                let frozen = rows.is_empty();
                let tensor = if frozen { None } else { Some(param.tensor.zeros_like()?) };
                Ok(GradientSlot { tensor, rows: rows.clone(), written: Cell::new(false) })
            })
            .collect::<Result<_>>()?;
        Ok(Gradients { slots, ids: params.iter().map(|param| param.id).collect() })
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
        for slot in &self.slots {
            if let Some(tensor) = &slot.tensor {
                reduce::fill(tensor, f32::NAN)?;
            }
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
        let mut problems = Vec::new();
        for (name, id, ranges) in params.checkpoint_names(map) {
            let Some(slot) = params.index_of(id).map(|n| &self.slots[n]) else { continue };
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
        let mut sum = 0.0;
        for (_, tensor, rows) in self.iter() {
            for range in rows {
                sum += reduce::sum_of_squares(&tensor.narrow(0, range.start, range.len())?)?;
            }
        }
        Ok(sum.sqrt())
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
        self.ids.iter().position(|candidate| *candidate == id).map(|n| &self.slots[n])
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
