//! What a plan is built for, and what is left to the own kernels.

use candle_core::Tensor;

use super::OP;
use super::shim::RawShape;
use crate::attention::{Cols, Heads, Qkv, Segment};
use crate::cuda::{Elem, operand};
use crate::device::deterministic;

/// Why cuDNN is not asked.
pub(super) type Refused = &'static str;

/// What a plan is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    backward: bool,
    pub(super) batch: usize,
    pub(super) len: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    scale_bits: u32,
    deterministic: bool,
}

impl Shape {
    /// The shape, or why cuDNN is not asked. It depends on the arguments alone, so that a run that
    /// is resumed takes the same way again.
    pub(super) fn of(
        qkv: &Qkv<'_>,
        segments: &[Segment],
        heads: &Heads,
        backward: bool,
    ) -> std::result::Result<Shape, Refused> {
        let Heads { heads: n, kv_heads, head_dim, scale, .. } = *heads;
        let packed = qkv.q.tensor;
        let whole = Qkv::packed(packed, heads);
        let same = |a: &Cols<'_>, b: &Cols<'_>| {
            a.tensor.id() == b.tensor.id() && a.start_col == b.start_col
        };
        let &[rows, width] = packed.dims() else {
            return Err("q, k and v are not rows");
        };
        if !(same(&qkv.q, &whole.q) && same(&qkv.k, &whole.k) && same(&qkv.v, &whole.v))
            || width != (n + 2 * kv_heads) * head_dim
        {
            return Err("q, k and v do not fill the rows of one tensor");
        }
        aligned(packed)?;
        if heads.softcap.is_some() || heads.alibi.is_some() {
            return Err("soft caps and ALiBi are left to the own kernels");
        }
        // Backward of wide heads has been wrong in versions that are in use.
        if !head_dim.is_multiple_of(8) || head_dim > if backward { 128 } else { 256 } {
            return Err("the heads are too wide, or not a multiple of 8 columns");
        }
        let mut documents = segments.iter().filter(|segment| segment.q_len > 0);
        let (batch, len) = match documents.clone().next() {
            Some(first) => (rows / first.q_len, first.q_len),
            None => return Err("there are no queries"),
        };
        let tile = documents.clone().count() == batch
            && batch * len == rows
            && documents.by_ref().enumerate().all(|(at, segment)| {
                *segment == Segment::document(at * len, len) && segment.prefix.is_empty()
            });
        if !tile {
            return Err("the documents differ in length, leave rows out or see other keys");
        }
        if heads.window.is_some_and(|window| window < len) {
            return Err("windows are left to the own kernels");
        }
        if len < 2 || batch * n > u16::MAX.into() || i32::try_from(rows * width).is_err() {
            return Err("there are too few or too many rows");
        }
        let deterministic = backward && deterministic();
        let scale_bits = scale.to_bits();
        Ok(Shape { backward, batch, len, heads: n, kv_heads, head_dim, scale_bits, deterministic })
    }

    /// A plan takes half a second. Training asks for one length all the time; prompts and texts to
    /// be scored have any length, once.
    pub(super) fn is_worth_a_plan(&self) -> bool {
        self.len.is_multiple_of(64) || (self.batch > 1 && self.batch * self.len >= 4096)
    }

    /// In a profile, with the operations that a causal mask leaves.
    pub(super) fn label(&self) -> (String, f64) {
        let Shape { backward, batch, len, heads, kv_heads, head_dim, .. } = *self;
        let pass = if backward { "backward" } else { "forward" };
        let products = if backward { 5.0 } else { 2.0 };
        let flops = products * (batch * heads * head_dim) as f64 * (len as f64).powi(2);
        (format!("cudnn: {pass} {batch} x {heads}({kv_heads}) x {len} x {head_dim}"), flops)
    }

    /// As the shim takes it.
    pub(super) fn raw(&self, capability: i32) -> RawShape {
        RawShape {
            batch: self.batch as i64,
            len: self.len as i64,
            heads: self.heads as i64,
            kv_heads: self.kv_heads as i64,
            head_dim: self.head_dim as i64,
            scale: f32::from_bits(self.scale_bits),
            capability,
            backward: self.backward.into(),
            deterministic: self.deterministic.into(),
        }
    }
}

/// cuDNN reads 16 bytes at a time.
pub(super) fn aligned(tensor: &Tensor) -> std::result::Result<(), Refused> {
    match operand(tensor, OP) {
        Ok(operand) if operand.elem == Elem::Bf16 && operand.ptr.is_multiple_of(16) => Ok(()),
        _ => Err("it wants contiguous bf16 tensors that begin at a multiple of 16 bytes"),
    }
}
