//! What happens to activations in front of a matrix.

use candle_core::Tensor;

use super::super::pointwise::curve_code;
use super::{Words, activations, numbers, numbers_or_null};
use crate::error::Result;
use crate::pointwise::Pointwise;

/// Words of one record of counts: how many inputs are not zero in any row of the batch, then in
/// each row (0 for rows that the batch does not have).
pub const COUNTS: usize = 9;

/// A norm over a whole row.
#[derive(Clone, Debug)]
pub struct Norm {
    /// LayerNorm: the mean is subtracted. Else RMSNorm.
    pub centred: bool,
    /// Added to the variance.
    pub eps: f32,
    /// What is multiplied, `[width]` f32: under Gemma's convention, 1 plus the stored weight.
    pub gain: Tensor,
    /// What is added, `[width]` f32.
    pub bias: Option<Tensor>,
}

/// A vector in front of a matrix, and what happens to it on the way in: the norm, `op`, the mask,
/// `then`.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// `[batch, width]` f32.
    pub x: &'a Tensor,
    /// The norm, if there is one.
    pub norm: Option<&'a Norm>,
    /// After the norm: the site's ReLU, or the activation of a plain MLP.
    pub op: Pointwise,
    /// `[width]` f32: where it is 0 the value becomes 0, elsewhere its magnitude plus 1e-3, which
    /// is not 0. For measurements at a density by decree.
    pub mask: Option<&'a Tensor>,
    /// After the mask: a second activation.
    pub then: Pointwise,
    /// Where the result is written too, `[batch, width]` f32.
    pub h: Option<&'a Tensor>,
    /// Where [`COUNTS`] words are written: the list of words, and the place of the first.
    pub counts: Option<(&'a Words, usize)>,
}

impl<'a> Input<'a> {
    /// `x` as it is.
    pub fn new(x: &'a Tensor) -> Input<'a> {
        let id = Pointwise::Identity;
        Input { x, norm: None, op: id, mask: None, then: id, h: None, counts: None }
    }

    /// `op(norm(x))`.
    pub fn normed(x: &'a Tensor, norm: &'a Norm, op: Pointwise) -> Input<'a> {
        Input { norm: Some(norm), op, ..Input::new(x) }
    }
}

/// `Feed` of `cu/decode.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Feed {
    pub(super) x: u64,
    gain: u64,
    bias: u64,
    mask: u64,
    h: u64,
    counts: u64,
    pub(super) width: i32,
    normed: i32,
    centred: i32,
    eps: f32,
    op: i32,
    op_p: f32,
    then: i32,
    then_p: f32,
}

impl Feed {
    /// How many lists of numbers, one for each input, it takes.
    pub(super) fn parameters(&self) -> usize {
        let lists = [self.normed != 0, self.normed != 0 && self.bias != 0, self.mask != 0];
        lists.into_iter().filter(|there| *there).count()
    }
}

impl Input<'_> {
    /// Batch, and what the kernels take.
    pub(super) fn feed(&self, op: &'static str) -> Result<(usize, Feed)> {
        let (x, batch, width) = activations(self.x, "x", op)?;
        let (gain, bias, centred, eps) = match self.norm {
            Some(norm) => (
                numbers(&norm.gain, width, "gain", op)?,
                numbers_or_null(norm.bias.as_ref(), width, "norm's bias", op)?,
                norm.centred,
                norm.eps,
            ),
            None => (0, 0, false, 0.0),
        };
        let (first, first_p) = curve_code(self.op);
        let (then, then_p) = curve_code(self.then);
        let feed = Feed {
            x,
            gain,
            bias,
            mask: numbers_or_null(self.mask, width, "mask", op)?,
            h: numbers_or_null(self.h, batch * width, "h", op)?,
            counts: self.counts.map_or(Ok(0), |(words, at)| words.at(at, COUNTS, op))?,
            width: width as i32,
            normed: i32::from(self.norm.is_some()),
            centred: i32::from(centred),
            eps,
            op: first,
            op_p: first_p,
            then,
            then_p,
        };
        Ok((batch, feed))
    }
}
