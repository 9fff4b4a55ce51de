//! The launch of kernels that go over elements four at a time (`cu/quad.cuh`).

use super::{Arg, Grid, Operand};

const THREADS: u32 = 256;
/// Elements of a block.
const TILE: usize = THREADS as usize * 4 * 4;

pub(super) fn grid(operand: &Operand) -> Grid {
    Grid::new(operand.len.div_ceil(TILE), THREADS)
}

/// Whether all begin at a multiple of four elements, as an argument.
pub(super) fn aligned(operands: &[&Operand]) -> Arg {
    i32::from(operands.iter().all(|operand| is_aligned(operand))).into()
}

pub(super) fn is_aligned(operand: &Operand) -> bool {
    operand.ptr.is_multiple_of(4 * operand.elem.bytes() as u64)
}
