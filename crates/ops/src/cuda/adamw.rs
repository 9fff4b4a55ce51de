//! AdamW on a GPU: all parameters in one launch.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;

use super::later::Later;
use super::quads::is_aligned;
use super::reduce::Clip;
use super::{Arg, Elem, Gpu, Grid, Module, Operand, module, operand};
use crate::adamw::{Factors, Item};
use crate::buffer::no_kernel;
use crate::error::Result;

static MODULE: Module = module!("adamw");

const THREADS: u32 = 256;
/// Elements of a block, as in `cu/adamw.cu`.
const TILE: usize = THREADS as usize * 8;

/// A run of a tensor's elements in the table, as in `cu/adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    param: u64,
    master: u64,
    grad: u64,
    m: u64,
    v: u64,
    weight_decay: f64,
    len: u64,
    /// Its first tile.
    first: u32,
    vec: u32,
}

/// What one kernel serves.
#[derive(Default)]
struct Group {
    entries: Vec<Entry>,
    firsts: Vec<u32>,
    tiles: usize,
}

/// The step's numbers; of `factors` the decay is each tensor's own.
pub(crate) struct Step<'a> {
    pub(crate) lr: f64,
    pub(crate) factors: &'a Factors,
}

/// One step of all; the shapes are checked, and `ranges` has the elements that move.
pub(crate) fn step_all(
    items: &[Item<'_>],
    ranges: &[Vec<Range<usize>>],
    step: &Step<'_>,
    op: &'static str,
) -> Result<()> {
    launch(items, ranges, step, None, op)
}

/// One step of all with gradients that are clipped to the norm `limit`, unless that is 0; their
/// norm before. The step is queued before the norm is known here: the GPU takes none where it is no
/// finite number.
pub(crate) fn step_clipped(
    items: &[Item<'_>],
    ranges: &[Vec<Range<usize>>],
    step: &Step<'_>,
    limit: f64,
    op: &'static str,
) -> Result<f64> {
    let Some(first) = items.first() else { return Ok(0.0) };
    let gpu = Gpu::of(first.param)?;
    let mut parts = Vec::with_capacity(items.len());
    for (item, ranges) in items.iter().zip(ranges) {
        let grad = operand(item.grad, op)?;
        parts.extend(ranges.iter().map(|range| part(&grad, range)));
    }
    let clip = Clip::queue(&gpu, &parts, limit, op)?;
    let norm = Later::<1>::queue(gpu, clip.norm(), op)?;
    launch(items, ranges, step, Some(&clip), op)?;
    let [norm] = norm.wait(op)?;
    Ok(norm)
}

fn launch(
    items: &[Item<'_>],
    ranges: &[Vec<Range<usize>>],
    step: &Step<'_>,
    clip: Option<&Clip>,
    op: &'static str,
) -> Result<()> {
    // Usually there is one group: a model's tensors have one type.
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for (item, ranges) in items.iter().zip(ranges) {
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let (kernel, entry) = entry(item, range, op)?;
            groups.entry(kernel).or_default().push(entry);
        }
    }
    let Some(first) = items.first() else { return Ok(()) };
    let gpu = Gpu::of(first.param)?;
    let Step { lr, factors } = step;
    for (kernel, group) in groups {
        // The same lists each step, so they travel once.
        let (entries, firsts) = (gpu.upload(&group.entries, op)?, gpu.upload(&group.firsts, op)?);
        gpu.launch(
            op,
            &MODULE,
            &kernel,
            None,
            Grid::new(group.tiles, THREADS),
            &[
                entries.ptr.into(),
                firsts.ptr.into(),
                (group.entries.len() as i32).into(),
                clip.map_or(0, Clip::factor).into(),
                Arg::from(lr.to_bits()),
                factors.grad_scale.into(),
                factors.beta1_rest.into(),
                factors.beta2.into(),
                factors.beta2_rest.into(),
                factors.step_size.into(),
                factors.root_scale.into(),
                factors.eps.into(),
            ],
        )?;
    }
    Ok(())
}

impl Group {
    fn push(&mut self, entry: Entry) {
        let first = self.tiles as u32;
        self.entries.push(Entry { first, ..entry });
        self.firsts.push(first);
        self.tiles += (entry.len as usize).div_ceil(TILE);
    }
}

/// A range of elements.
fn part(operand: &Operand, range: &Range<usize>) -> Operand {
    Operand { ptr: operand.at(range.start), len: range.len(), ..*operand }
}

/// The kernel for a run of a parameter, and its line in the table.
fn entry(item: &Item<'_>, range: &Range<usize>, op: &'static str) -> Result<(String, Entry)> {
    let at = |t: &Tensor| -> Result<Operand> { Ok(part(&operand(t, op)?, range)) };
    let (param, grad, m, v) = (at(item.param)?, at(item.grad)?, at(item.m)?, at(item.v)?);
    let master = item.master.map(at).transpose()?;
    if v.elem != m.elem {
        return Err(no_kernel(item.v, op));
    }
    let name = match (master, param.elem) {
        (Some(_), _) => "mixed",
        (None, Elem::F32) => "f32",
        (None, Elem::Bf16) => "bf16",
    };
    let kernel = format!("step_{name}_{}_{}", grad.elem.suffix(), m.elem.suffix());
    let all: [Option<&Operand>; 5] =
        [Some(&param), master.as_ref(), Some(&grad), Some(&m), Some(&v)];
    let entry = Entry {
        param: param.ptr,
        master: master.map_or(0, |master| master.ptr),
        grad: grad.ptr,
        m: m.ptr,
        v: v.ptr,
        weight_decay: item.weight_decay,
        len: range.len() as u64,
        first: 0,
        vec: u32::from(all.into_iter().flatten().all(is_aligned)),
    };
    Ok((kernel, entry))
}
