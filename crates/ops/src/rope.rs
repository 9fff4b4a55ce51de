//! Rotary positions: pairs of a head's elements turn by an angle that grows with the position.
//!
//! `(a, b) -> (a cos - b sin, b cos + a sin)`; the backward pass turns the other way. Only the first
//! `rot` elements of a head turn (partial rotary), in one of two layouts.

use std::ops::Range;

use candle_core::Tensor;
use multiversion::multiversion;

use crate::buffer::{dims2, ensure_range, write_f32};
use crate::error::{Error, Result};
use crate::par::{for_chunks, grain};

/// Cosine and sine of each position's angles.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Pairs that turn in a head: `rot / 2`.
    pairs: usize,
    max_pos: usize,
    #[cfg(feature = "cuda")]
    copied: crate::cuda::rope::Copied,
}

impl RopeTable {
    /// Angles `position * inv_freq[i]` for the positions before `max_pos`, their cosine and sine times
    /// `attention_factor` (1, except under YaRN).
    ///
    /// The angle is rounded to f32 before its cosine is taken, as Hugging Face does
    /// (`LlamaRotaryEmbedding.forward`): at large positions that is not the same number.
    #[must_use]
    pub fn new(inv_freq: &[f64], max_pos: usize, attention_factor: f64) -> Self {
        let angles = (0..max_pos)
            .flat_map(|p| inv_freq.iter().map(move |&f| f64::from(p as f32 * f as f32)));
        let (cos, sin) = angles
            .map(|a| ((a.cos() * attention_factor) as f32, (a.sin() * attention_factor) as f32))
            .unzip();
        Self {
            cos,
            sin,
            pairs: inv_freq.len(),
            max_pos,
            #[cfg(feature = "cuda")]
            copied: std::sync::OnceLock::new(),
        }
    }

    /// The number of positions.
    #[must_use]
    pub fn max_pos(&self) -> usize {
        self.max_pos
    }

    /// How many elements of a head turn.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        2 * self.pairs
    }

    /// The table on a GPU, `[max_pos, 2, pairs]`; it stays on the first that asks.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self, device: &candle_core::Device) -> Result<Tensor> {
        if let Some(there) = self.copied.get().filter(|there| there.device().same_device(device)) {
            return Ok(there.clone());
        }
        let rows = self.cos.chunks_exact(self.pairs).zip(self.sin.chunks_exact(self.pairs));
        let both: Vec<f32> = rows.flat_map(|(cos, sin)| [cos, sin].concat()).collect();
        let there = Tensor::from_vec(both, (self.max_pos, 2, self.pairs), device)?;
        // Another thread's copy, or that of another GPU, may be there.
        let _ = self.copied.set(there.clone());
        Ok(there)
    }

    /// Turns each head of a slice in place, as [`apply`] does: for decoders that work without
    /// tensors. The position is one of the table's, the slice a whole number of heads.
    pub fn turn(&self, heads: &mut [f32], head_dim: usize, pairs: RopePairs, position: u32) {
        let (cos, sin) = self.at(position);
        match pairs {
            RopePairs::Half => turn_half(heads, head_dim, cos, sin, 1.0),
            RopePairs::Interleaved => turn_interleaved(heads, head_dim, cos, sin, 1.0),
        }
    }

    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let row = position as usize * self.pairs..(position as usize + 1) * self.pairs;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + rot/2` (Llama, GPT-NeoX).
    Half,
    /// `2i` and `2i + 1` (GPT-J).
    Interleaved,
}

/// Turns each head of the columns `cols` of `x` `[n, width]` in place, row `i` by the angles of
/// `positions[i]`; `inverse` turns back, which is the backward pass.
///
/// # Errors
/// [`Error::PositionOutOfRange`], [`Error::Range`], [`Error::Indivisible`] if `cols` is no whole number of
/// heads, [`Error::Unsupported`] if more elements turn than a head has, [`Error::Shape`] if there are
/// not `n` positions, [`Error::NoKernel`], [`Error::NotContiguous`].
#[allow(clippy::too_many_arguments, reason = "one call says all about a rotation")]
pub fn apply(
    x: &Tensor,
    cols: Range<usize>,
    head_dim: usize,
    table: &RopeTable,
    pairs: RopePairs,
    positions: &[u32],
    inverse: bool,
) -> Result<()> {
    const OP: &str = "rope";
    let (n, width) = dims2(x, OP, "x")?;
    ensure_range(&cols, width, OP, "columns")?;
    if head_dim == 0 || !cols.len().is_multiple_of(head_dim) {
        return Err(Error::Indivisible {
            op: OP,
            what: "columns",
            len: cols.len(),
            part: head_dim,
        });
    }
    if table.rotary_dim() > head_dim {
        let what = format!("turning {} elements of heads of {head_dim}", table.rotary_dim());
        return Err(Error::Unsupported { op: OP, what });
    }
    if positions.len() != n {
        let (expected, found) = (vec![n], vec![positions.len()]);
        return Err(Error::Shape { op: OP, tensor: "positions", expected, found });
    }
    if let Some(index) = positions.iter().position(|&p| p as usize >= table.max_pos) {
        let (position, max_pos) = (positions[index], table.max_pos);
        return Err(Error::PositionOutOfRange { op: OP, index, position, max_pos });
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::cuda::rope::apply(
            x, cols, head_dim, table, pairs, positions, inverse, width, OP,
        );
    }
    write_f32(x, OP, |x| {
        let sign = if inverse { -1.0 } else { 1.0 };
        for_chunks(((x, width), (positions, 1)), n, grain(cols.len()), &|(
            (x, _),
            (positions, _),
        )| {
            for (x, &position) in x.chunks_exact_mut(width.max(1)).zip(positions) {
                let (cos, sin) = table.at(position);
                match pairs {
                    RopePairs::Half => turn_half(&mut x[cols.clone()], head_dim, cos, sin, sign),
                    RopePairs::Interleaved => {
                        turn_interleaved(&mut x[cols.clone()], head_dim, cos, sin, sign);
                    }
                }
            }
        });
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn turn_half(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, rest) = head.split_at_mut(half);
        for (((a, b), &cos), &sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
            let (x, y, sin) = (*a, *b, sign * sin);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn turn_interleaved(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
    for head in heads.chunks_exact_mut(head_dim) {
        for ((pair, &cos), &sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
            let (x, y, sin) = (pair[0], pair[1], sign * sin);
            pair[0] = x * cos - y * sin;
            pair[1] = y * cos + x * sin;
        }
    }
}
