//! Into the residual stream, and from logits to the next token.

use candle_core::Tensor;

use super::super::{Grid, Module, module};
use super::launch::queue;
use super::{GpuMatrix, Words, activations};
use crate::buffer::ensure_shape;
use crate::error::{Error, Result};

static MODULE: Module = module!("decode_token");

/// `Embed` of `cu/embed.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Embed {
    tokens: u64,
    positions: u64,
    table: u64,
    scales: u64,
    learned: u64,
    learned_scales: u64,
    pub(super) x: u64,
    stride: i64,
    learned_stride: i64,
    rows: i32,
    learned_rows: i32,
    offset: i32,
    pub(super) width: i32,
    factor: f32,
    pad: i32,
}

/// The rows of tokens, and of positions where those are learned.
#[derive(Clone, Copy)]
pub struct Embedding<'a> {
    /// Of each sequence.
    pub tokens: &'a Words,
    /// Of each sequence.
    pub positions: &'a Words,
    /// `[vocab, width]`.
    pub table: &'a GpuMatrix,
    /// What rows of the table are multiplied by.
    pub factor: f32,
    /// `[positions, width]` in the format of the table, and what is added to a position.
    pub learned: Option<(&'a GpuMatrix, usize)>,
    /// `[batch, width]` f32.
    pub x: &'a Tensor,
}

const EMBED: &str = "embedding of a token";

impl Embedding<'_> {
    /// Sequences, and what the kernels take.
    pub(super) fn embed(&self) -> Result<(usize, Embed)> {
        let Embedding { tokens, positions, table, factor, learned, x } = *self;
        let (to, batch, width) = activations(x, "x", EMBED)?;
        ensure_shape(x, EMBED, "x", &[batch, table.cols()])?;
        if let Some((learned, _)) = learned {
            ensure_shape(x, EMBED, "x", &[batch, learned.cols()])?;
            if learned.format() != table.format() {
                let message = "tokens and positions are stored in two formats".to_string();
                return Err(Error::Invalid { op: EMBED, message });
            }
        }
        let (matrix, offset) = learned.unwrap_or((table, 0));
        let embed = Embed {
            tokens: tokens.at(0, batch, EMBED)?,
            positions: positions.at(0, batch, EMBED)?,
            table: table.data(),
            scales: table.scales(),
            learned: learned.map_or(0, |(learned, _)| learned.data()),
            learned_scales: matrix.scales(),
            x: to,
            stride: table.stride() as i64,
            learned_stride: matrix.stride() as i64,
            rows: table.rows() as i32,
            learned_rows: matrix.rows() as i32,
            offset: offset as i32,
            width: width as i32,
            factor,
            pad: 0,
        };
        Ok((batch, embed))
    }
}

/// `x[b] = factor * table[tokens[b]] + learned[positions[b] + offset]`. A token or position outside
/// its table gives NaN.
///
/// # Errors
/// Shapes that do not fit; two formats of tables.
pub fn embed(it: &Embedding<'_>) -> Result<()> {
    const THREADS: usize = 256;
    let (batch, embed) = it.embed()?;
    let blocks = (it.table.cols().div_ceil(THREADS) as u32, batch as u32, 1);
    let grid = Grid { blocks, ..Grid::new(1, THREADS as u32) };
    let name = format!("embed_{}", it.table.format().name());
    queue(&it.table.gpu, EMBED, (&MODULE, &name), grid, &embed)
}

/// `Next` of `cu/decode_token.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Next {
    logits: u64,
    words: u64,
    len: i32,
    pad: i32,
}

/// `tokens[b] = argmax(logits[b])` of `[batch, vocab]`; the lowest of equals, and never a NaN.
///
/// # Errors
/// Shapes that do not fit.
pub fn argmax(logits: &Tensor, tokens: &Words) -> Result<()> {
    const OP: &str = "argmax";
    let (from, batch, vocab) = activations(logits, "logits", OP)?;
    let next = Next { logits: from, words: tokens.at(0, batch, OP)?, len: vocab as i32, pad: 0 };
    let gpu = super::super::Gpu::of(logits)?;
    queue(&gpu, OP, (&MODULE, "argmax"), Grid::new(batch, 1024), &next)
}

/// Adds 1 to every word: positions, after a token.
///
/// # Errors
/// An error of the GPU.
pub fn advance(positions: &Words) -> Result<()> {
    const OP: &str = "next position";
    let len = positions.len();
    let next = Next { logits: 0, words: positions.at(0, len, OP)?, len: len as i32, pad: 0 };
    queue(positions.gpu(), OP, (&MODULE, "advance"), Grid::over(len, 128), &next)
}
