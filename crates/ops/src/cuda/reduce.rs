//! Reductions on a GPU, and the small in-place steps of a training loop.

use std::sync::Arc;

use candle_core::Tensor;

use super::quads::{aligned, grid};
use super::{Arg, Elem, Gpu, Grid, Module, Operand, Scratch, module, operand};
use crate::error::{Error, Result};

static MODULE: Module = module!("reduce");

const THREADS: u32 = 256;
/// Elements of a block, as in `cu/reduce.cu`.
const CHUNK: usize = 16384;

pub(crate) fn sum_of_squares(t: &Tensor, op: &'static str) -> Result<f64> {
    let (gpu, x) = (Gpu::of(t)?, operand(t, op)?);
    let blocks = x.len.div_ceil(CHUNK);
    let partial = gpu.scratch(blocks * size_of::<f64>(), op)?;
    let args = [(&x).into(), partial.ptr.into(), x.len.into(), vectors(&x)];
    gpu.launch(op, &MODULE, "squares", Some(x.elem), Grid::new(blocks, THREADS), &args)?;
    total(&gpu, &partial, blocks, op)
}

/// One of several tensors, as in `cu/reduce.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Slice {
    ptr: u64,
    len: u64,
    is_bf16: u32,
    vec: u32,
}

/// The sum of squares over several tensors on one GPU: one launch, one number back.
pub(crate) fn sum_of_squares_of(tensors: &[&Tensor], op: &'static str) -> Result<f64> {
    let Some(first) = tensors.first() else { return Ok(0.0) };
    let gpu = Gpu::of(first)?;
    let parts = tensors.iter().map(|t| operand(t, op)).collect::<Result<Vec<_>>>()?;
    let sum = queue_squares(&gpu, &parts, op)?;
    Ok(one(&gpu.download(sum.ptr, 1, op)?))
}

/// Queues that sum: an f64 on the device.
fn queue_squares(gpu: &Gpu, parts: &[Operand], op: &'static str) -> Result<Scratch> {
    let (mut slices, mut firsts) = (Vec::with_capacity(parts.len()), Vec::new());
    let mut chunks = 0;
    for x in parts.iter().filter(|x| x.len > 0) {
        slices.push(Slice {
            ptr: x.ptr,
            len: x.len as u64,
            is_bf16: u32::from(x.elem == Elem::Bf16),
            vec: u32::from(x.vectorises(0)),
        });
        firsts.push(chunks as u32);
        chunks += x.len.div_ceil(CHUNK);
    }
    if chunks == 0 {
        return zeros(gpu, size_of::<f64>(), op);
    }
    let partial = gpu.scratch(chunks * size_of::<f64>(), op)?;
    let (list, owners) = (gpu.upload(&slices, op)?, gpu.upload(&firsts, op)?);
    let args =
        [list.ptr.into(), owners.ptr.into(), (slices.len() as i32).into(), partial.ptr.into()];
    gpu.launch(op, &MODULE, "squares_of_many", None, Grid::new(chunks, THREADS), &args)?;
    queue_total(gpu, &partial, chunks, op)?;
    Ok(partial)
}

/// The norm of gradients and the factor that clips them, on the device.
pub(crate) struct Clip(Scratch);

impl Clip {
    /// Queues the norm over `parts` and its factor for `limit`; a limit of 0 clips nothing.
    pub(crate) fn queue(
        gpu: &Gpu,
        parts: &[Operand],
        limit: f64,
        op: &'static str,
    ) -> Result<Clip> {
        let squares = queue_squares(gpu, parts, op)?;
        let clip = Clip(gpu.scratch(size_of::<f64>() + size_of::<f32>(), op)?);
        let args = [
            squares.ptr.into(),
            Arg::from(limit.to_bits()),
            clip.norm().into(),
            clip.factor().into(),
        ];
        gpu.launch(op, &MODULE, "clip_factor", None, Grid::new(1, 1), &args)?;
        Ok(clip)
    }

    /// The address of the norm, an f64.
    pub(crate) fn norm(&self) -> u64 {
        self.0.ptr
    }

    /// The address of the factor, an f32; NaN where the norm is no finite number.
    pub(crate) fn factor(&self) -> u64 {
        self.0.ptr + size_of::<f64>() as u64
    }
}

/// The sum of partial sums, in a fixed order.
fn total(gpu: &Gpu, partial: &Scratch, n: usize, op: &'static str) -> Result<f64> {
    if n == 0 {
        return Ok(0.0);
    }
    queue_total(gpu, partial, n, op)?;
    Ok(one(&gpu.download(partial.ptr, 1, op)?))
}

/// Queues that sum, which takes the first one's place; there is one at least.
fn queue_total(gpu: &Gpu, partial: &Scratch, n: usize, op: &'static str) -> Result<()> {
    let args = [partial.ptr.into(), n.into()];
    gpu.launch(op, &MODULE, "total", None, Grid::new(1, 1024), &args)
}

pub(crate) fn count_nonzero(t: &Tensor, op: &'static str) -> Result<u64> {
    Ok(one(&gather(t, "nonzeros", op)?))
}

pub(crate) fn all_finite(t: &Tensor, op: &'static str) -> Result<bool> {
    Ok(one::<u32>(&gather(t, "infinite", op)?) == 0)
}

pub(crate) fn max_abs(t: &Tensor, op: &'static str) -> Result<f32> {
    Ok(f32::from_bits(one(&gather(t, "largest", op)?)))
}

/// One number that the blocks of a kernel put together, beginning at 0.
fn gather<R: Copy + Default>(t: &Tensor, kernel: &str, op: &'static str) -> Result<Vec<R>> {
    let gpu = Gpu::of(t)?;
    let found = zeros(&gpu, size_of::<R>(), op)?;
    queue_gather(&gpu, t, kernel, found.ptr, op)?;
    gpu.download(found.ptr, 1, op)
}

/// Queues that; the number at `to` was 0.
fn queue_gather(gpu: &Gpu, t: &Tensor, kernel: &str, to: u64, op: &'static str) -> Result<()> {
    let x = operand(t, op)?;
    let args = [(&x).into(), to.into(), x.len.into(), vectors(&x)];
    let grid = Grid::new(x.len.div_ceil(CHUNK), THREADS);
    gpu.launch(op, &MODULE, kernel, Some(x.elem), grid, &args)
}

/// Counts of non-zeros that stay on the GPU until they are read.
#[derive(Default)]
pub(crate) struct Counts {
    gpu: Option<Arc<Gpu>>,
    /// Room for [`Counts::EACH`] counts each.
    rooms: Vec<Scratch>,
    len: usize,
}

impl Counts {
    const EACH: usize = 256;

    pub(crate) fn count(&mut self, t: &Tensor, op: &'static str) -> Result<()> {
        let gpu = Gpu::of(t)?;
        if self.len == self.rooms.len() * Self::EACH {
            self.rooms.push(zeros(&gpu, Self::EACH * size_of::<u64>(), op)?);
        }
        if let Some(room) = self.rooms.last() {
            let at = (self.len % Self::EACH * size_of::<u64>()) as u64;
            queue_gather(&gpu, t, "nonzeros", room.ptr + at, op)?;
        }
        self.len += 1;
        self.gpu = Some(gpu);
        Ok(())
    }

    pub(crate) fn read(self, op: &'static str) -> Result<Vec<u64>> {
        let Some(gpu) = self.gpu else { return Ok(Vec::new()) };
        let mut counts = Vec::with_capacity(self.rooms.len() * Self::EACH);
        for room in &self.rooms {
            counts.extend(gpu.download::<u64>(room.ptr, Self::EACH, op)?);
        }
        counts.truncate(self.len);
        Ok(counts)
    }
}

pub(crate) fn count_nonzero_rows(
    t: &Tensor,
    (rows, width): (usize, usize),
    op: &'static str,
) -> Result<Vec<u32>> {
    let (gpu, x, cols) = (Gpu::of(t)?, operand(t, op)?, int(width, op)?);
    let counts = gpu.scratch(rows * size_of::<u32>(), op)?;
    // A warp for a row, unless rows are too few to keep the GPU busy so.
    let per_block = THREADS as usize / 32;
    let whole = rows < gpu.processors as usize * per_block * 8 && width > 1024;
    let blocks = if whole { rows } else { rows.div_ceil(per_block) };
    gpu.launch(
        op,
        &MODULE,
        "row_nonzeros",
        Some(x.elem),
        Grid::new(blocks, THREADS),
        &[
            (&x).into(),
            counts.ptr.into(),
            rows.into(),
            cols.into(),
            i32::from(x.vectorises(width)).into(),
            i32::from(whole).into(),
        ],
    )?;
    gpu.download(counts.ptr, rows, op)
}

pub(crate) fn count_nonzero_columns(
    t: &Tensor,
    (rows, width): (usize, usize),
    op: &'static str,
) -> Result<Vec<u64>> {
    /// Rows of a block, as in `cu/reduce.cu`.
    const ROWS: usize = 128;
    let (gpu, x, cols) = (Gpu::of(t)?, operand(t, op)?, int(width, op)?);
    let counts = zeros(&gpu, width * size_of::<u64>(), op)?;
    let (kernel, columns) = match x.vectorises(width) {
        true => ("column_nonzeros_vec", 32 * x.elem.per_vector()),
        false => ("column_nonzeros", 32),
    };
    let down = rows.div_ceil(ROWS) as u32;
    let mut grid = Grid::new(0, THREADS);
    grid.blocks = (down, width.div_ceil(columns) as u32, 1);
    let args = [(&x).into(), counts.ptr.into(), rows.into(), cols.into()];
    gpu.launch(op, &MODULE, kernel, Some(x.elem), grid, &args)?;
    gpu.download(counts.ptr, width, op)
}

/// Counts between `edges`, which ascend.
pub(crate) fn histogram(t: &Tensor, edges: &[f32], op: &'static str) -> Result<Vec<u64>> {
    let (gpu, x) = (Gpu::of(t)?, operand(t, op)?);
    let bins = edges.len() + 1;
    let counts = zeros(&gpu, bins * size_of::<u64>(), op)?;
    let known = gpu.upload(edges, op)?;
    let bytes = bins * size_of::<u32>() + size_of_val(edges);
    let shared = bytes <= 48 << 10;
    // So few blocks that a block's counts of 32 bits are worth their collection, and last.
    let blocks = x.len.div_ceil(CHUNK).min(gpu.processors as usize * 8);
    gpu.launch(
        op,
        &MODULE,
        "histogram",
        Some(x.elem),
        Grid::new(blocks, THREADS).shared(if shared { bytes } else { 0 }),
        &[
            (&x).into(),
            known.ptr.into(),
            counts.ptr.into(),
            x.len.into(),
            int(edges.len(), op)?.into(),
            i32::from(shared).into(),
        ],
    )?;
    gpu.download(counts.ptr, bins, op)
}

pub(crate) fn scale_in_place(t: &Tensor, factor: f32, op: &'static str) -> Result<()> {
    let (gpu, x) = (Gpu::of(t)?, operand(t, op)?);
    let args = [(&x).into(), factor.into(), x.len.into(), aligned(&[&x])];
    gpu.launch(op, &MODULE, "scale", Some(x.elem), grid(&x), &args)
}

pub(crate) fn fill(t: &Tensor, value: f32, op: &'static str) -> Result<()> {
    let (gpu, x) = (Gpu::of(t)?, operand(t, op)?);
    let args = [(&x).into(), value.into(), x.len.into(), aligned(&[&x])];
    gpu.launch(op, &MODULE, "fill", Some(x.elem), grid(&x), &args)
}

/// `dst += src`, of one shape; either type.
pub(crate) fn add_in_place(dst: &Tensor, src: &Tensor, op: &'static str) -> Result<()> {
    let (gpu, to, from) = (Gpu::of(dst)?, operand(dst, op)?, operand(src, op)?);
    let kernel = format!("add_{}_to", from.elem.suffix());
    let args = [(&to).into(), (&from).into(), to.len.into(), aligned(&[&to, &from])];
    gpu.launch(op, &MODULE, &kernel, Some(to.elem), grid(&to), &args)
}

/// Whether a tensor begins where vectors may, as an argument.
fn vectors(x: &Operand) -> Arg {
    i32::from(x.vectorises(0)).into()
}

fn zeros(gpu: &Gpu, bytes: usize, op: &'static str) -> Result<Scratch> {
    let scratch = gpu.scratch(bytes, op)?;
    gpu.zero(scratch.ptr, bytes, op)?;
    Ok(scratch)
}

fn int(value: usize, op: &'static str) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Unsupported { op, what: format!("a width of {value}") })
}

/// The one number that came back.
fn one<R: Copy + Default>(found: &[R]) -> R {
    found.first().copied().unwrap_or_default()
}
