//! Moving rows on a GPU.

use std::collections::HashSet;
use std::ops::Range;

use candle_core::Tensor;

use super::{Gpu, Grid, Module, empty, module, operand};
use crate::error::{Error, Result};

static MODULE: Module = module!("rows");

const THREADS: u32 = 256;

/// A matrix's place, and its stride in bytes.
#[derive(Clone, Copy)]
struct Rows {
    ptr: u64,
    stride: usize,
}

/// The rows `rows` of `x`, which it has.
pub(crate) fn gather(x: &Tensor, rows: &[usize], width: usize, op: &'static str) -> Result<Tensor> {
    let (gpu, out) = (Gpu::of(x)?, empty((rows.len(), width), x.dtype(), x.device(), op)?);
    let (source, target) = (operand(x, op)?, operand(&out, op)?);
    let list = gpu.upload(rows, op)?;
    let bytes = width * source.elem.bytes();
    let matrix = |ptr| Rows { ptr, stride: bytes };
    let places = (matrix(source.ptr), matrix(target.ptr));
    copy_rows(&gpu, places, (list.ptr, 0), (rows.len(), bytes), op)?;
    Ok(out)
}

/// Writes columns of `x`, whose width comes with it, into rows of `target`; all of them exist.
pub(crate) fn scatter(
    (x, width): (&Tensor, usize),
    cols: Range<usize>,
    target: &Tensor,
    rows: &[usize],
    op: &'static str,
) -> Result<()> {
    let (gpu, source) = (Gpu::of(target)?, operand(x, op)?);
    let out = operand(target, op)?.like(&source, target, op)?;
    let size = source.elem.bytes();
    let from = Rows { ptr: source.at(cols.start), stride: width * size };
    let to = Rows { ptr: out.ptr, stride: cols.len() * size };
    let bytes = cols.len() * size;
    if rows.is_sorted_by(|a, b| a < b) {
        let list = gpu.upload(rows, op)?;
        return copy_rows(&gpu, (from, to), (0, list.ptr), (rows.len(), bytes), op);
    }
    // Of rows that go to one place the last wins, so only that is sent there.
    let mut taken = HashSet::with_capacity(rows.len());
    let (from_list, to_list): (Vec<usize>, Vec<usize>) =
        rows.iter().copied().enumerate().rev().filter(|(_, row)| taken.insert(*row)).unzip();
    let lists = (gpu.upload(&from_list, op)?, gpu.upload(&to_list, op)?);
    copy_rows(&gpu, (from, to), (lists.0.ptr, lists.1.ptr), (to_list.len(), bytes), op)
}

/// Moves runs of rows, each after the one before it.
pub(crate) fn relocate(
    t: &Tensor,
    moves: &[(usize, usize, usize)],
    width: usize,
    op: &'static str,
) -> Result<()> {
    let (gpu, x) = (Gpu::of(t)?, operand(t, op)?);
    for &(from, to, len) in moves {
        let (source, target) = (x.at(from * width), x.at(to * width));
        let bytes = len * width * x.elem.bytes();
        if from == to {
            continue;
        }
        if from.abs_diff(to) >= len {
            gpu.copy(source, target, bytes, op)?;
        } else {
            let between = gpu.scratch(bytes, op)?;
            gpu.copy(source, between.ptr, bytes, op)?;
            gpu.copy(between.ptr, target, bytes, op)?;
        }
    }
    Ok(())
}

/// Copies the first `bytes` bytes of `n` rows; a list of rows may be null.
fn copy_rows(
    gpu: &Gpu,
    (from, to): (Rows, Rows),
    (from_list, to_list): (u64, u64),
    (n, bytes): (usize, usize),
    op: &'static str,
) -> Result<()> {
    let fits = |unit: usize| {
        [from.ptr, to.ptr].iter().all(|ptr| ptr.is_multiple_of(unit as u64))
            && [from.stride, to.stride, bytes].iter().all(|len| len.is_multiple_of(unit))
    };
    let unit = [16, 4].into_iter().find(|unit| fits(*unit)).unwrap_or(2);
    let width = i32::try_from(bytes / unit).map_err(|_| {
        let what = format!("rows of {bytes} bytes");
        Error::Unsupported { op, what }
    })?;
    gpu.launch(
        op,
        &MODULE,
        &format!("copy_rows_{unit}"),
        None,
        Grid::over(n * (bytes / unit), THREADS),
        &[
            from.ptr.into(),
            to.ptr.into(),
            from_list.into(),
            to_list.into(),
            n.into(),
            width.into(),
            (from.stride / unit).into(),
            (to.stride / unit).into(),
        ],
    )
}
