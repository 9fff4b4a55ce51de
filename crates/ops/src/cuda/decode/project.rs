//! Projections: `y = W in(x) + bias`, by rows of inputs or by rows of outputs.

use candle_core::Tensor;

use super::super::pointwise::curve_code;
use super::super::{Grid, Module, module};
use super::input::Feed;
use super::launch::queue;
use super::rows::{Dot, queue_rows};
use super::{Format, GpuMatrix, Input, Room, activations, numbers_or_null};
use crate::buffer::ensure_shape;
use crate::error::Result;
use crate::pointwise::Pointwise;

static MODULE: Module = module!("decode_add");

/// Where a projection's result goes.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// `[batch, outputs]` f32.
    pub y: &'a Tensor,
    /// `[outputs]` f32.
    pub bias: Option<&'a Tensor>,
    /// Adds to `y`, the residual stream, instead of writing it.
    pub add: bool,
    /// `y = cap tanh(y / cap)`: a head's.
    pub softcap: Option<f32>,
}

impl<'a> Output<'a> {
    /// Overwrites `y`.
    pub fn new(y: &'a Tensor, bias: Option<&'a Tensor>) -> Output<'a> {
        Output { y, bias, add: false, softcap: None }
    }

    /// Adds to `y`.
    pub fn residual(y: &'a Tensor, bias: Option<&'a Tensor>) -> Output<'a> {
        Output { add: true, ..Output::new(y, bias) }
    }
}

/// `Out` of `cu/decode.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Out {
    pub(super) y: u64,
    bias: u64,
    pub(super) outputs: i32,
    pub(super) add: i32,
    softcap: f32,
    pad: i32,
}

impl Output<'_> {
    pub(super) fn out(&self, batch: usize, outputs: usize, op: &'static str) -> Result<Out> {
        ensure_shape(self.y, op, "y", &[batch, outputs])?;
        Ok(Out {
            y: activations(self.y, "y", op)?.0,
            bias: numbers_or_null(self.bias, outputs, "bias", op)?,
            outputs: outputs as i32,
            add: i32::from(self.add),
            softcap: self.softcap.unwrap_or(0.0),
            pad: 0,
        })
    }
}

/// How [`project_by_input`] shares out a matrix: `columns` of the outputs a block, and the list of
/// inputs in `shares` parts, which other blocks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// A multiple of 32, at most 512.
    pub columns: usize,
    /// From 1 to 32.
    pub shares: usize,
}

impl Tiles {
    /// The shortest way for so many outputs on a GPU of so many multiprocessors: one block on
    /// each, so that the next kernel's find room beside them, of rows as long as that allows.
    pub fn best(outputs: usize, processors: usize) -> Tiles {
        let widths = (1..=16).map(|n| 32 * n);
        let all = widths.map(|columns| {
            let tiles = outputs.div_ceil(columns);
            Tiles { columns, shares: (processors / tiles).clamp(1, Room::SHARES) }
        });
        let cost = |tiles: &Tiles| {
            let blocks = outputs.div_ceil(tiles.columns) * tiles.shares;
            let waves = blocks.div_ceil(processors);
            // In sixteenths of an even share: a little more work may have longer rows.
            let work = 16 * waves * tiles.columns * processors / (tiles.shares * outputs.max(1));
            (work, std::cmp::Reverse(tiles.columns))
        };
        all.min_by_key(cost).unwrap_or(Tiles { columns: 256, shares: 1 })
    }
}

/// `Add` of `cu/decode_add.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Add {
    feed: Feed,
    out: Out,
    weights: u64,
    scales: u64,
    partial: u64,
    counters: u64,
    /// Elements between rows.
    stride: i64,
    columns: i32,
    shares: i32,
    /// Inputs that are listed at a time.
    chunk: i32,
    pad: i32,
}

/// `y = W in(x) + bias` with `matrix` `[inputs, outputs]`: rows of inputs that are zero in the
/// whole batch are not read.
///
/// # Errors
/// Shapes that do not fit; a batch other than 1, 2, 4 or 8; tensors that are not f32 on a GPU.
pub fn project_by_input(
    input: &Input<'_>,
    matrix: &GpuMatrix,
    output: &Output<'_>,
    room: &Room,
) -> Result<()> {
    let tiles = Tiles::best(matrix.cols(), matrix.gpu.processors as usize);
    project_by_input_in(tiles, input, matrix, output, room)
}

/// As [`project_by_input`], shared out as the caller says.
///
/// # Errors
/// As [`project_by_input`].
pub fn project_by_input_in(
    tiles: Tiles,
    input: &Input<'_>,
    matrix: &GpuMatrix,
    output: &Output<'_>,
    room: &Room,
) -> Result<()> {
    const OP: &str = "projection by input";
    const THREADS: usize = 512;
    /// Bytes of shared memory for what enters: two kernels find room on a multiprocessor.
    const SHARED: usize = 108 << 10;
    /// Inputs that a block's threads read at once, four each, and how often they do so at most.
    const STEP: usize = 4 * THREADS;
    const STEPS: usize = 8;
    let (batch, feed) = input.feed(OP)?;
    ensure_shape(input.x, OP, "x", &[batch, matrix.rows()])?;
    let outputs = matrix.cols();
    let out = output.out(batch, outputs, OP)?;
    let columns = tiles.columns.next_multiple_of(32).clamp(32, 512);
    let blocks = outputs.div_ceil(columns);
    let most = (room.floats / (batch * blocks * columns)).min(Room::SHARES);
    // Where nothing is counted the room does not matter.
    let shares = if blocks > Room::COUNTERS { 1 } else { tiles.shares.min(most).max(1) };
    // An input's values in all rows, what is done to them, and its place in the list.
    let parameters = feed.parameters() + usize::from(matrix.format() == Format::Int8);
    let entry = 4 * batch + 4 * parameters + 2;
    let chunk = match SHARED / entry / STEP * STEP {
        most if most < matrix.rows() => most.min(STEPS * STEP),
        _ => matrix.rows().next_multiple_of(8).min(STEPS * STEP),
    };
    let add = Add {
        feed,
        out,
        weights: matrix.data(),
        scales: matrix.scales(),
        partial: room.partial.ptr,
        counters: room.counters.ptr,
        stride: matrix.stride() as i64,
        columns: columns as i32,
        shares: shares as i32,
        chunk: chunk as i32,
        pad: 0,
    };
    // Later the sums of the groups, up to 16 columns a thread and two results a column.
    let listed = chunk * entry;
    let sums = 4 * THREADS * (per_thread(matrix.format(), batch) + 1);
    let grid = Grid {
        blocks: (blocks as u32, shares as u32, 1),
        threads: THREADS as u32,
        shared_bytes: listed.max(sums) as u32,
    };
    let name = format!("add_{}_{batch}", matrix.format().name());
    queue(&matrix.gpu, OP, (&MODULE, &name), grid, &add)
}

/// Columns of a thread: what it reads of a row at once.
pub(super) fn per_thread(format: Format, batch: usize) -> usize {
    match (format, batch) {
        (Format::F32, _) => 4,
        (Format::Bf16, _) => 8,
        (Format::Int8, 1 | 2) => 16,
        (Format::Int8, _) => 8,
    }
}

/// `y = W in(x) + bias` with `matrix` `[outputs, inputs]`: every row is read.
///
/// # Errors
/// As [`project_by_input`].
pub fn project_by_output(input: &Input<'_>, matrix: &GpuMatrix, output: &Output<'_>) -> Result<()> {
    const OP: &str = "projection by output";
    let (batch, feed) = input.feed(OP)?;
    ensure_shape(input.x, OP, "x", &[batch, matrix.cols()])?;
    let out = output.out(batch, matrix.rows(), OP)?;
    let dot = Dot::new(feed, out, &[matrix], batch);
    queue_rows(&matrix.gpu, OP, matrix.format(), batch, false, &dot)
}

/// A dense gated MLP's first half: `products = then(activation(gate in(x) + bias) * (up in(x) + bias))`,
/// `[batch, ffn]`, both matrices `[ffn, hidden]` with their biases. Every row is read.
///
/// # Errors
/// As [`project_by_input`]; matrices of two shapes or formats.
pub fn gate_and_up(
    input: &Input<'_>,
    (gate, gate_bias): (&GpuMatrix, Option<&Tensor>),
    (up, up_bias): (&GpuMatrix, Option<&Tensor>),
    (activation, then): (Pointwise, Pointwise),
    products: &Tensor,
) -> Result<()> {
    const OP: &str = "gate and up";
    let (batch, feed) = input.feed(OP)?;
    ensure_shape(input.x, OP, "x", &[batch, gate.cols()])?;
    super::matrix::ensure_alike(gate, up, OP)?;
    let ffn = gate.rows();
    let out = Output::new(products, gate_bias).out(batch, ffn, OP)?;
    let mut dot = Dot::new(feed, out, &[gate, up], batch);
    dot.up_bias = numbers_or_null(up_bias, ffn, "bias of up", OP)?;
    (dot.act, dot.act_p) = curve_code(activation);
    (dot.then, dot.then_p) = curve_code(then);
    queue_rows(&gate.gpu, OP, gate.format(), batch, true, &dot)
}
