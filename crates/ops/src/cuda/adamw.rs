//! AdamW on a GPU: all parameters in one launch.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;

use super::quads::is_aligned;
use super::{Arg, Elem, Gpu, Grid, Module, Operand, module, operand};
use crate::adamw::{Factors, Item};
use crate::buffer::no_kernel;
use crate::error::Result;

static MODULE: Module = module!("adamw");

const THREADS: u32 = 256;

/// A tensor of the table, as in `cu/adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    param: u64,
    master: u64,
    grad: u64,
    m: u64,
    v: u64,
    weight_decay: f64,
    vec: u64,
}

/// What a block does.
#[repr(C)]
#[derive(Clone, Copy)]
struct Chunk {
    start: u64,
    entry: u32,
    len: u32,
}

/// The tensors for which one kernel serves.
#[derive(Default)]
struct Group<'a> {
    entries: Vec<Entry>,
    ranges: Vec<&'a [Range<usize>]>,
}

/// One step of all; the shapes are checked, and `ranges` has the elements that move. Of `factors`
/// the decay is each tensor's own.
pub(crate) fn step_all(
    items: &[Item<'_>],
    ranges: &[Vec<Range<usize>>],
    lr: f64,
    factors: &Factors,
    op: &'static str,
) -> Result<()> {
    // Usually there is one group: a model's tensors have one type.
    let mut groups: BTreeMap<String, Group<'_>> = BTreeMap::new();
    for (item, ranges) in items.iter().zip(ranges) {
        let (kernel, entry) = entry(item, op)?;
        let group = groups.entry(kernel).or_default();
        group.entries.push(entry);
        group.ranges.push(ranges);
    }
    let Some(first) = items.first() else { return Ok(()) };
    let gpu = Gpu::of(first.param)?;
    for (kernel, group) in groups {
        let chunks = chunks(&group);
        // The same lists each step, so they travel once.
        let (entries, list) = (gpu.upload(&group.entries, op)?, gpu.upload(&chunks, op)?);
        gpu.launch(
            op,
            &MODULE,
            &kernel,
            None,
            Grid::new(chunks.len(), THREADS),
            &[
                entries.ptr.into(),
                list.ptr.into(),
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

/// The kernel for a parameter, and its line in the table.
fn entry(item: &Item<'_>, op: &'static str) -> Result<(String, Entry)> {
    let at = |t: &Tensor| operand(t, op);
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
        vec: u64::from(all.into_iter().flatten().all(is_aligned)),
    };
    Ok((kernel, entry))
}

/// The elements that move, in pieces: many for each multiprocessor, so that none waits long for
/// the last.
fn chunks(group: &Group<'_>) -> Vec<Chunk> {
    let all = || group.ranges.iter().copied().flatten();
    let total: usize = all().map(Range::len).sum();
    let piece = (total / (1 << 14)).clamp(1 << 12, 1 << 15).next_multiple_of(1 << 12);
    let mut chunks = Vec::with_capacity(total / piece + all().count());
    for (ranges, entry) in group.ranges.iter().zip(0..) {
        for range in *ranges {
            chunks.extend(range.clone().step_by(piece).map(|start| {
                let len = piece.min(range.end - start) as u32;
                Chunk { start: start as u64, entry, len }
            }));
        }
    }
    chunks
}
