//! Rows of outputs times a vector: all of them, or those of a gated MLP's active neurons.
//!
//! Two ways: a warp for each row where inputs fit beside it ([`Rows`]), and a team of warps with
//! the inputs in registers, for larger batches and listed rows ([`Dot`]).

use candle_core::Tensor;

use super::super::pointwise::curve_code;
use super::super::{Gpu, Grid, Module, module};
use super::input::Feed;
use super::launch::queue;
use super::project::{Out, Output, per_thread};
use super::{COUNTS, Format, GpuMatrix, Input, Words, numbers, numbers_or_null};
use crate::buffer::ensure_shape;
use crate::error::Result;
use crate::pointwise::Pointwise;

static TEAMS: Module = module!("decode_dot");
static STREAMS: Module = module!("decode_rows");

/// Warps of a block.
const WARPS: usize = 16;

/// `Rows` of `cu/decode_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    feed: Feed,
    out: Out,
    weights: [u64; 2],
    scales: [u64; 2],
    up_bias: u64,
    /// Elements between rows.
    stride: i64,
    act: i32,
    act_p: f32,
    then: i32,
    then_p: f32,
}

/// `Dot` of `cu/decode_dot.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Dot {
    feed: Feed,
    out: Out,
    weights: [u64; 2],
    scales: [u64; 2],
    pub(super) up_bias: u64,
    /// Of the listed kind: the gate before its activation, `[batch, ffn]`.
    gate: u64,
    mask: u64,
    counts: u64,
    /// Elements between rows.
    stride: i64,
    /// Warps that share a row, and loads of a thread that a row needs.
    team: i32,
    slabs: i32,
    pub(super) act: i32,
    pub(super) act_p: f32,
    pub(super) then: i32,
    pub(super) then_p: f32,
    /// Of the listed kind: how often each thread looks at 32 gates.
    rounds: i32,
    pad: i32,
}

impl Dot {
    pub(super) fn new(feed: Feed, out: Out, matrices: &[&GpuMatrix], batch: usize) -> Dot {
        let first = matrices[0];
        let second = matrices.get(1).copied().unwrap_or(first);
        let loads = first.cols().div_ceil(per_thread(first.format(), batch));
        // As few loads a thread as a block can have, and then no more warps than that takes.
        let slabs = loads.div_ceil(32 * WARPS);
        let team = loads.div_ceil(32 * slabs);
        Dot {
            feed,
            out,
            weights: [first.data(), second.data()],
            scales: [first.scales(), second.scales()],
            up_bias: 0,
            gate: 0,
            mask: 0,
            counts: 0,
            stride: first.stride() as i64,
            team: team as i32,
            slabs: slabs as i32,
            act: 0,
            act_p: 0.0,
            then: 0,
            then_p: 0.0,
            rounds: 0,
            pad: 0,
        }
    }

    /// Of a block: as many teams as there is room for.
    fn threads(&self) -> usize {
        let team = self.team as usize;
        32 * (WARPS / team) * team
    }
}

/// Queues the kernel of all rows, or of `pairs` of rows.
pub(super) fn queue_rows(
    gpu: &Gpu,
    op: &'static str,
    format: Format,
    batch: usize,
    pairs: bool,
    dot: &Dot,
) -> Result<()> {
    /// Of a multiprocessor, where the driver keeps some for itself.
    const SHARED: usize = 200 << 10;
    let outputs = dot.out.outputs as usize;
    let shared = 4 * dot.stride as usize * (batch + dot.feed.parameters());
    if batch > 2 || shared > SHARED {
        let kind = if pairs { "pair" } else { "dot" };
        return queue_teams(gpu, op, kind, format, batch, outputs, dot);
    }
    let rows = Rows {
        feed: dot.feed,
        out: dot.out,
        weights: dot.weights,
        scales: dot.scales,
        up_bias: dot.up_bias,
        stride: dot.stride,
        act: dot.act,
        act_p: dot.act_p,
        then: dot.then,
        then_p: dot.then_p,
    };
    let kind = if pairs { "row_pairs" } else { "rows" };
    let name = format!("{kind}_{}_{batch}", format.name());
    let blocks = (2 * gpu.processors as usize).min(outputs.div_ceil(WARPS));
    let grid = Grid::new(blocks, 32 * WARPS as u32).shared(shared);
    queue(gpu, op, (&STREAMS, &name), grid, &rows)
}

/// Queues a kernel of `cu/decode_dot.cu` over `rows` rows, or pairs of them: one block for each
/// multiprocessor, which share out the rows evenly.
fn queue_teams(
    gpu: &Gpu,
    op: &'static str,
    kind: &str,
    format: Format,
    batch: usize,
    rows: usize,
    dot: &Dot,
) -> Result<()> {
    let name = format!("{kind}_{}_{batch}", format.name());
    let blocks = (gpu.processors as usize).min(rows);
    let threads = dot.threads();
    // Of the listed kind: a bit for each gate, and a block's part of the list.
    let rounds = dot.rounds as usize;
    let list = if rounds > 0 { 4 * rounds * threads + 4 * (rows.div_ceil(blocks) + 1) } else { 0 };
    let grid = Grid::new(blocks, threads as u32).shared(list);
    queue(gpu, op, (&TEAMS, &name), grid, dot)
}

/// The second half of a gated MLP's first half: `up` where the gate is open.
#[derive(Clone, Copy)]
pub struct UpRows<'a> {
    /// What the gate's projection gave, bias included, before its activation: `[batch, ffn]` f32.
    pub gate: &'a Tensor,
    /// The gate's activation: a ReLU of some kind, else nothing is skipped.
    pub activation: Pointwise,
    /// `[ffn]` f32, on the gate after its activation: as [`Input::mask`].
    pub mask: Option<&'a Tensor>,
    /// What `up` reads, `[batch, hidden]` f32: [`Input::h`] of the gate's projection.
    pub h: &'a Tensor,
    /// `[ffn, hidden]`.
    pub up: &'a GpuMatrix,
    /// `[ffn]` f32.
    pub bias: Option<&'a Tensor>,
    /// On the products.
    pub then: Pointwise,
    /// `[batch, ffn]` f32: every element is written, 0 where the gate is closed.
    pub products: &'a Tensor,
    /// Where [`COUNTS`] words are written: how many gates are open.
    pub counts: Option<(&'a Words, usize)>,
}

/// `products = then(activation(gate) * (up h + bias))`. Rows of `up` whose gate is 0 in the whole
/// batch are not read.
///
/// # Errors
/// Shapes that do not fit; a batch other than 1, 2, 4 or 8; tensors that are not f32 on a GPU.
pub fn up_rows(it: &UpRows<'_>) -> Result<()> {
    const OP: &str = "up of open gates";
    let (batch, feed) = Input::new(it.h).feed(OP)?;
    let ffn = it.up.rows();
    ensure_shape(it.h, OP, "h", &[batch, it.up.cols()])?;
    ensure_shape(it.gate, OP, "gate", &[batch, ffn])?;
    let out = Output::new(it.products, None).out(batch, ffn, OP)?;
    let mut dot = Dot::new(feed, out, &[it.up], batch);
    dot.up_bias = numbers_or_null(it.bias, ffn, "bias of up", OP)?;
    dot.gate = numbers(it.gate, batch * ffn, "gate", OP)?;
    dot.mask = numbers_or_null(it.mask, ffn, "mask", OP)?;
    dot.counts = it.counts.map_or(Ok(0), |(words, at)| words.at(at, COUNTS, OP))?;
    (dot.act, dot.act_p) = curve_code(it.activation);
    (dot.then, dot.then_p) = curve_code(it.then);
    dot.rounds = ffn.div_ceil(32 * dot.threads()) as i32;
    queue_teams(&it.up.gpu, OP, "listed", it.up.format(), batch, ffn, &dot)
}
