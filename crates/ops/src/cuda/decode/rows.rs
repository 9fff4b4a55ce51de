//! Rows of outputs times a vector: all of them, or those of a gated MLP's active neurons.

use candle_core::Tensor;

use super::super::pointwise::curve_code;
use super::super::{Gpu, Grid, Module, module};
use super::input::Feed;
use super::project::{Out, Output, per_thread, queue_dot};
use super::{COUNTS, GpuMatrix, Input, Words, numbers, numbers_or_null};
use crate::buffer::ensure_shape;
use crate::error::Result;
use crate::pointwise::Pointwise;

pub(super) static MODULE: Module = module!("decode_dot");

/// Warps of a block.
const WARPS: usize = 16;

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

/// One block for each multiprocessor, which share out the rows evenly.
pub(super) fn dot_grid(gpu: &Gpu, rows: usize, dot: &Dot) -> Grid {
    let blocks = (gpu.processors as usize).min(rows);
    let threads = dot.threads();
    // Of the listed kind: a bit for each gate, and a block's part of the list.
    let rounds = dot.rounds as usize;
    let list = if rounds > 0 { 4 * rounds * threads + 4 * (rows.div_ceil(blocks) + 1) } else { 0 };
    Grid::new(blocks, threads as u32).shared(list)
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
    queue_dot(&it.up.gpu, OP, "listed", it.up.format(), batch, ffn, &dot)
}
