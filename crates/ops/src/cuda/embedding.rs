//! Embeddings: rows by id, and the gradient of their table.

use candle_core::Tensor;

use super::{Arg, Elem, Gpu, Grid, Module, Operand, empty, module, operand};
use crate::buffer::{Accum, Dest};
use crate::error::{Error, Result};

static MODULE: Module = module!("embedding");

/// `m table[ids]`; everything is checked.
pub(crate) fn forward(
    table: &Tensor,
    ids: &[u32],
    multiplier: Option<f32>,
    width: usize,
    op: &'static str,
) -> Result<Tensor> {
    let x = empty((ids.len(), width), table.dtype(), table.device(), op)?;
    gather("embedding_forward", &x, table, ids, Some(multiplier.unwrap_or(1.0)), width, op)?;
    Ok(x)
}

/// `x[i] += table[ids[i]]`; everything is checked.
pub(crate) fn add_rows(
    x: &Tensor,
    table: &Tensor,
    ids: &[u32],
    width: usize,
    op: &'static str,
) -> Result<()> {
    gather("embedding_add_rows", x, table, ids, None, width, op)
}

fn gather(
    name: &str,
    x: &Tensor,
    table: &Tensor,
    ids: &[u32],
    m: Option<f32>,
    width: usize,
    op: &'static str,
) -> Result<()> {
    /// Items of a thread, as in the kernel.
    const EACH: usize = 4;
    let gpu = Gpu::of(x)?;
    let (x_at, table_at) = (operand(x, op)?, operand(table, op)?);
    let table_at = table_at.like(&x_at, table, op)?;
    if ids.is_empty() || width == 0 {
        return Ok(());
    }
    let ids_at = gpu.upload(ids, op)?;
    let (packs, suffix) = packs(&[&x_at, &table_at], x_at.elem, width);
    let share = (MOST / packs).max(1);
    for first in (0..ids.len()).step_by(share) {
        let items = share.min(ids.len() - first) * packs;
        let mut args: Vec<Arg> = vec![
            (&table_at).into(),
            (ids_at.ptr + (first * size_of::<u32>()) as u64).into(),
            x_at.at(first * width).into(),
            (items as u32).into(),
            (packs as u32).into(),
        ];
        args.extend(m.map(Arg::from));
        let grid = Grid::over(items.div_ceil(EACH), 256);
        let name = format!("{name}{suffix}");
        gpu.launch(op, &MODULE, &name, Some(x_at.elem), grid, &args)?;
    }
    Ok(())
}

/// Items of a launch: kernels count them in 32 bits.
const MOST: usize = 1 << 30;

/// How many packs of elements a row of all these tensors has, and what the kernels for them are
/// called.
fn packs(all: &[&Operand], elem: Elem, width: usize) -> (usize, &'static str) {
    let aligned = all.iter().all(|operand| operand.ptr.is_multiple_of(16));
    match aligned && width.is_multiple_of(elem.per_vector()) {
        true => (width / elem.per_vector(), ""),
        false => (width, "_odd"),
    }
}

/// The gradient of the table; everything is checked.
pub(crate) fn backward(
    ids: &[u32],
    dx: &Tensor,
    multiplier: Option<f32>,
    (dtable, accum): Dest<'_>,
    width: usize,
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(dx)?;
    let (dx, to) = (operand(dx, op)?, operand(dtable, op)?);
    if accum == Accum::Overwrite {
        gpu.zero(to.ptr, to.byte_len(), op)?;
    }
    if ids.is_empty() || width == 0 {
        return Ok(());
    }
    let plan = Plan::new(ids, op)?;
    let places = gpu.upload(&plan.places, op)?;
    let pieces = gpu.upload(&plan.pieces, op)?;
    let partial = gpu.scratch(plan.slots * width * size_of::<f32>(), op)?;
    let m = multiplier.unwrap_or(1.0);
    // Ids with places are written once: over zeros, adding would be the same but slower.
    let add = i32::from(accum == Accum::Add);
    let (packs, suffix) = packs(&[&dx, &to], dx.elem, width);
    let threads = packs.next_multiple_of(32).min(256);
    let across = packs.div_ceil(threads);
    let grid = Grid {
        blocks: (plan.pieces.len() as u32, across as u32, 1),
        threads: threads as u32,
        shared_bytes: 0,
    };
    let args: [Arg; 8] = [
        (&dx).into(),
        places.ptr.into(),
        pieces.ptr.into(),
        (&to).into(),
        add.into(),
        partial.ptr.into(),
        (packs as u32).into(),
        m.into(),
    ];
    let name = format!("embedding_backward{suffix}_{}", to.elem.suffix());
    gpu.launch(op, &MODULE, &name, Some(dx.elem), grid, &args)?;
    if plan.groups.is_empty() {
        return Ok(());
    }
    let groups = gpu.upload(&plan.groups, op)?;
    let grid = Grid {
        blocks: (plan.groups.len() as u32, width.div_ceil(32) as u32, 1),
        threads: 256,
        shared_bytes: 0,
    };
    let args: [Arg; 6] = [
        partial.ptr.into(),
        groups.ptr.into(),
        (&to).into(),
        add.into(),
        (width as u32).into(),
        m.into(),
    ];
    gpu.launch(op, &MODULE, "embedding_finish", Some(to.elem), grid, &args)
}

/// Which places are added where.
struct Plan {
    /// Sorted by id, and by place among equal ids.
    places: Vec<u32>,
    /// (id, from, to, slot): a stretch of the places of one id, whose sum goes to the table or, if
    /// the id has several, to a slot.
    pieces: Vec<[u32; 4]>,
    /// (id, first slot, number of slots, 0).
    groups: Vec<[u32; 4]>,
    slots: usize,
}

impl Plan {
    /// Places of a piece. A token may be all of a batch: its sum must not be one block's work.
    const LONGEST: usize = 64;
    /// No slot: the sum goes to the table.
    const NONE: u32 = u32::MAX;

    fn new(ids: &[u32], op: &'static str) -> Result<Plan> {
        if u32::try_from(ids.len()).is_err() {
            return Err(Error::Unsupported { op, what: format!("{} ids", ids.len()) });
        }
        let mut keys: Vec<u64> =
            ids.iter().zip(0u64..).map(|(&id, place)| (u64::from(id) << 32) | place).collect();
        keys.sort_unstable();
        let places = keys.iter().map(|&key| key as u32).collect();
        let mut plan = Plan { places, pieces: Vec::new(), groups: Vec::new(), slots: 0 };
        let mut from = 0;
        for same in keys.chunk_by(|a, b| a >> 32 == b >> 32) {
            plan.add((same[0] >> 32) as u32, from, same.len());
            from += same.len();
        }
        Ok(plan)
    }

    fn add(&mut self, id: u32, from: usize, len: usize) {
        let count = len.div_ceil(Plan::LONGEST);
        if count > 1 {
            self.groups.push([id, self.slots as u32, count as u32, 0]);
        }
        for piece in 0..count {
            let start = from + piece * Plan::LONGEST;
            let end = (start + Plan::LONGEST).min(from + len);
            let slot = if count > 1 { (self.slots + piece) as u32 } else { Plan::NONE };
            self.pieces.push([id, start as u32, end as u32, slot]);
        }
        if count > 1 {
            self.slots += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_has_each_place_once() {
        let ids: Vec<u32> = (0..300).map(|i| if i % 3 == 0 { i % 7 } else { 9 }).collect();
        let plan = Plan::new(&ids, "test").unwrap();
        let mut seen = vec![false; ids.len()];
        for &[id, from, to, _] in &plan.pieces {
            for &place in &plan.places[from as usize..to as usize] {
                assert_eq!(ids[place as usize], id);
                assert!(!std::mem::replace(&mut seen[place as usize], true));
            }
        }
        assert!(seen.into_iter().all(|seen| seen));
        assert_eq!(plan.groups, [[9, 0, 4, 0]]);
        assert_eq!(plan.slots, 4);
    }
}
