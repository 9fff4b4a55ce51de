//! Rotary positions.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::Tensor;

use super::{Arg, Gpu, Grid, Module, module, operand};
use crate::error::Result;
use crate::rope::{RopePairs, RopeTable};

static MODULE: Module = module!("rope");

/// A table on the GPU where it was used first, `[max_pos, 2, pairs]`.
pub(crate) type Copied = OnceLock<Tensor>;

/// Threads of a block.
const THREADS: u32 = 256;
/// Items of a launch: kernels count them in 32 bits.
const MOST: usize = 1 << 30;

/// Turns heads in place; everything is checked.
#[allow(clippy::too_many_arguments, reason = "as the public function")]
pub(crate) fn apply(
    x: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    table: &RopeTable,
    pairs: RopePairs,
    positions: &[u32],
    inverse: bool,
    width: usize,
    op: &'static str,
) -> Result<()> {
    let gpu = Gpu::of(x)?;
    let to = operand(x, op)?;
    let (heads, count) = (cols.len() / head_dim, table.rotary_dim() / 2);
    if positions.is_empty() || heads == 0 || count == 0 {
        return Ok(());
    }
    let angles = table.on_gpu(x.device())?;
    let angles = operand(&angles, op)?;
    let rows_at = gpu.upload(positions, op)?;
    let sign = if inverse { -1f32 } else { 1f32 };
    let elements = to.elem.per_vector();
    let (name, step) = match pairs {
        RopePairs::Half => ("rope_half", elements),
        RopePairs::Interleaved => ("rope_interleaved", elements / 2),
    };
    let whole = [cols.start, width, head_dim].iter().all(|n| n.is_multiple_of(elements));
    let vectors = to.vectorises(elements) && whole && count.is_multiple_of(step);
    /// Heads of a thread, as in the kernel.
    const HEADS: usize = 2;
    let (per_head, apart) =
        if vectors { (count / step, heads.div_ceil(HEADS)) } else { (count, heads) };
    let share = (MOST / (per_head * apart)).max(1);
    for first in (0..positions.len()).step_by(share) {
        let rows = share.min(positions.len() - first);
        let items = rows * per_head * apart;
        let mut args: Vec<Arg> = vec![
            to.at(first * width + cols.start).into(),
            angles.ptr.into(),
            (rows_at.ptr + (first * size_of::<u32>()) as u64).into(),
            (items as u32).into(),
        ];
        if vectors {
            args.extend::<[Arg; 2]>([(per_head as u32).into(), (apart as u32).into()]);
        }
        args.extend::<[Arg; 5]>([
            (heads as u32).into(),
            width.into(),
            (head_dim as u32).into(),
            (count as u32).into(),
            sign.into(),
        ]);
        let name = if vectors { name.to_string() } else { format!("{name}_pairs") };
        let grid = Grid::over(items, THREADS);
        gpu.launch(op, &MODULE, &name, Some(to.elem), grid, &args)?;
    }
    Ok(())
}
