//! Packed weights times many tokens: decoded to f32 in tiles that fit a cache, and multiplied by the
//! product's library.

use std::ops::Range;

use relufy_ops::gemm::{Accum, MatMut, MatRef, Threads, gemm};

use crate::Result;
use crate::kernels::{Isa, decode_rows};
use crate::matrix::{Rows, padded};

/// Rows of a tile.
pub(crate) const HIGH: usize = 256;
/// Columns of a tile, which with as many rows fills half of a core's own cache.
const WIDE: usize = 512;

/// The product's registers hold a multiple of so many tokens.
const TOKENS: usize = 16;

/// Weights as f32, `HIGH` rows of `WIDE` columns, which are multiplied by many tokens while they are in a
/// cache. The product's inner loop takes neighbours in memory: columns of a row, or else tokens.
pub(crate) struct Tile {
    weights: Vec<f32>,
    list: Vec<u32>,
    /// Tokens' inputs the other way round, `[inputs, tokens padded]`.
    turned: Vec<f32>,
    /// What comes of them, `[HIGH, tokens padded]`.
    sums: Vec<f32>,
}

impl Tile {
    /// For so many tokens of so many inputs.
    pub fn new(tokens: usize, inputs: usize) -> Tile {
        let tokens = tokens.next_multiple_of(TOKENS);
        Tile {
            weights: vec![0.0; HIGH * WIDE],
            list: Vec::with_capacity(HIGH),
            turned: vec![0.0; tokens * inputs],
            sums: vec![0.0; tokens * HIGH],
        }
    }

    /// `out[t] += sum input[t][i] row[which[i]]`: some rows' `columns`, of tokens with an input for each of
    /// these rows.
    pub fn add_inputs(
        &mut self,
        isa: Isa,
        rows: &Rows<'_>,
        (which, columns): (Range<usize>, Range<usize>),
        (input, count): (&[f32], usize),
        out: &mut [f32],
    ) -> Result<()> {
        let (inputs, width) = (which.len(), columns.len());
        for at in columns.clone().step_by(WIDE) {
            let wide = at..columns.end.min(at + WIDE);
            for start in (0..inputs).step_by(HIGH) {
                let high = start..inputs.min(start + HIGH);
                let from = which.start + high.start..which.start + high.end;
                let b = decode(isa, rows, from, wide.clone(), &mut self.list, &mut self.weights)?;
                let a = MatRef::with_stride(&input[start..], count, high.len(), inputs)?;
                let to = &mut out[at - columns.start..];
                let c = MatMut::with_stride(to, count, wide.len(), width, Accum::Add)?;
                gemm(1.0, a, b, c, Threads::One)?;
            }
        }
        Ok(())
    }

    /// Takes the inputs of so many tokens, for [`Tile::add_outputs`].
    pub fn turn(&mut self, input: &[f32], count: usize) {
        let tokens = count.next_multiple_of(TOKENS);
        let inputs = input.len() / count;
        turn(input, count, inputs, &mut self.turned[..inputs * tokens], tokens);
    }

    /// `out[t][k] += input[t] . row[which[k]]`, of the tokens that [`Tile::turn`] has taken.
    pub fn add_outputs(
        &mut self,
        isa: Isa,
        rows: &Rows<'_>,
        which: Range<usize>,
        count: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let (tokens, width) = (count.next_multiple_of(TOKENS), which.len());
        for start in which.clone().step_by(HIGH) {
            let high = start..which.end.min(start + HIGH);
            let sums = &mut self.sums[..high.len() * tokens];
            for at in (0..rows.cols).step_by(WIDE) {
                let wide = at..rows.cols.min(at + WIDE);
                let list = &mut self.list;
                let a = decode(isa, rows, high.clone(), wide.clone(), list, &mut self.weights)?;
                let b = MatRef::new(&self.turned[at * tokens..], wide.len(), tokens)?;
                let accum = if at == 0 { Accum::Overwrite } else { Accum::Add };
                gemm(1.0, a, b, MatMut::new(sums, high.len(), tokens, accum)?, Threads::One)?;
            }
            let to = start - which.start;
            for (t, out) in out.chunks_exact_mut(width).enumerate() {
                let out = out[to..to + high.len()].iter_mut();
                out.zip(sums[t..].iter().step_by(tokens)).for_each(|(out, sum)| *out += sum);
            }
        }
        Ok(())
    }
}

/// Columns of some rows as a tile.
fn decode<'a>(
    isa: Isa,
    rows: &Rows<'_>,
    which: Range<usize>,
    columns: Range<usize>,
    list: &mut Vec<u32>,
    tile: &'a mut [f32],
) -> Result<MatRef<'a>> {
    list.clear();
    list.extend(which.start as u32..which.end as u32);
    decode_rows(isa, rows, list, columns.clone(), tile);
    Ok(MatRef::with_stride(tile, list.len(), columns.len(), padded(columns.len()))?)
}

/// Rows as columns: `from` is `[rows, cols]`, and `to` has `[cols, stride]`.
fn turn(from: &[f32], rows: usize, cols: usize, to: &mut [f32], stride: usize) {
    // A block's lines stay in the cache until all of it is there.
    for start in (0..rows).step_by(TOKENS) {
        for col in 0..cols {
            for row in start..rows.min(start + TOKENS) {
                to[col * stride + row] = from[row * cols + col];
            }
        }
    }
}
