//! What both passes need: the inputs on their GPU, the kernels that know them, and their tiles.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys;

use super::OP;
use super::kernels::{Exact, Fast, Kernel, Kernels};
use super::plan::{self, Plain, Side, Tiles};
use crate::attention::{Cols, Heads, Qkv};
use crate::cuda::gpu::failed;
use crate::cuda::{Arg, Elem, Gpu, Grid, Scratch, operand};
use crate::error::Result;

/// Columns of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    /// Address of the first in row 0.
    pub(super) ptr: u64,
    /// Elements from a row to the next.
    pub(super) width: usize,
}

impl Columns {
    /// Whether heads of whole vectors begin and end at whole vectors.
    pub(super) fn vectorise(self, elem: Elem) -> bool {
        self.ptr.is_multiple_of(16) && self.width.is_multiple_of(elem.per_vector())
    }
}

/// The inputs on their GPU.
pub(super) struct Problem<'a> {
    pub(super) gpu: Arc<Gpu>,
    pub(super) heads: &'a Heads,
    pub(super) elem: Elem,
    /// Rows of the queries' tensor.
    pub(super) n_q: usize,
    /// Rows of the keys' tensor.
    pub(super) n_k: usize,
    pub(super) q: Columns,
    pub(super) k: Columns,
    pub(super) v: Columns,
    /// How products become scores, as kernels take it.
    pub(super) score: [Arg; 6],
    /// What the last of these arguments points to.
    _slopes: Option<Arc<Scratch>>,
}

/// Segments and their tiles of one side, on the GPU.
pub(super) struct Work {
    pub(super) segments: Arc<Scratch>,
    pub(super) items: Arc<Scratch>,
    pub(super) tiles: Tiles,
}

impl Work {
    /// As kernels take it.
    pub(super) fn args(&self) -> [Arg; 2] {
        [self.segments.ptr.into(), self.items.ptr.into()]
    }
}

impl<'a> Problem<'a> {
    pub(super) fn new(qkv: &Qkv<'_>, heads: &'a Heads) -> Result<Self> {
        for cols in [&qkv.q, &qkv.k, &qkv.v] {
            plan::count(cols.tensor.dim(0)?)?;
        }
        let gpu = Gpu::of(qkv.q.tensor)?;
        let first = operand(qkv.q.tensor, OP)?;
        let columns = |cols: &Cols<'_>| -> Result<Columns> {
            let all = operand(cols.tensor, OP)?.like(&first, cols.tensor, OP)?;
            Ok(Columns { ptr: all.at(cols.start_col), width: cols.tensor.dim(1)? })
        };
        let slopes = match &heads.alibi {
            Some(alibi) => Some(gpu.upload(&alibi.slopes, OP)?),
            None => None,
        };
        let alibi = heads.alibi.as_ref();
        let score = [
            heads.scale.into(),
            plan::window(heads.window).into(),
            heads.softcap.unwrap_or(0.0).into(),
            slopes.as_ref().map_or(0, |slopes| slopes.ptr).into(),
            alibi.map_or(0.0, |alibi| alibi.factor).into(),
            i32::from(alibi.is_some_and(|alibi| alibi.bf16)).into(),
        ];
        Ok(Problem {
            heads,
            elem: first.elem,
            n_q: qkv.q.tensor.dim(0)?,
            n_k: qkv.k.tensor.dim(0)?,
            q: columns(&qkv.q)?,
            k: columns(&qkv.k)?,
            v: columns(&qkv.v)?,
            score,
            _slopes: slopes,
            gpu,
        })
    }

    /// Heads of queries that share a head of keys.
    pub(super) fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    /// The tensor cores' kernels, if they know the heads, every tensor is made of whole vectors and
    /// the GPU has room for those of this pass; else the exact ones.
    pub(super) fn kernels(&self, tensors: &[Columns], pass: &[Kernel]) -> Result<Kernels> {
        let whole = || tensors.iter().all(|columns| columns.vectorise(self.elem));
        let known = Fast::of(self.heads.head_dim).filter(|_| self.elem == Elem::Bf16 && whole());
        if let Some(fast) = known {
            let attribute =
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            let most = self.gpu.stream.context().attribute(attribute).map_err(|e| failed(OP, e))?;
            let bytes = |&kernel: &Kernel| i64::from(fast.grid(kernel, (1, 1)).shared_bytes);
            if pass.iter().all(|kernel| bytes(kernel) <= i64::from(most)) {
                return Ok(Kernels::Fast(fast));
            }
        }
        Ok(Kernels::Exact(Exact::of(self.heads.head_dim)?))
    }

    /// The tensor cores' kernel of a head size, or its twin for everything that makes a score more
    /// than a product times a positive factor.
    pub(super) fn fast_name(&self, kernel: Kernel) -> String {
        let Heads { head_dim, scale, softcap, alibi, .. } = self.heads;
        let plain = softcap.is_none() && alibi.is_none() && *scale > 0.0;
        format!("attention_{}_{head_dim}{}", kernel.name(), if plain { "" } else { "_extras" })
    }

    /// The tiles of one side.
    pub(super) fn work(&self, segments: &[Plain], side: Side, owned: usize) -> Result<Work> {
        let tiles = plan::tiles(segments, side, owned, plan::window(self.heads.window));
        let items = self.gpu.upload(&tiles.items, OP)?;
        Ok(Work { segments: self.gpu.upload(segments, OP)?, items, tiles })
    }

    /// Key heads whose blocks run together: their walks over `rows` of two tensors, of as many
    /// heads a key head, shall stay in the cache.
    pub(super) fn heads_at_a_time(&self, rows: usize, heads: usize) -> usize {
        let bytes = 2 * heads * self.heads.head_dim * self.elem.bytes();
        plan::heads_at_a_time(self.heads.kv_heads, rows, bytes)
    }

    /// The blocks of a fast kernel that owns queries, and how many of their heads run together.
    pub(super) fn query_blocks(
        &self,
        fast: &Fast,
        kernel: Kernel,
        segments: &[Plain],
        work: &Work,
    ) -> (Grid, i32) {
        let keys = segments.iter().map(|segment| segment[3] as usize).sum();
        let key_heads = self.heads_at_a_time(keys, 1);
        let together = key_heads * self.group();
        let blocks = (work.tiles.items.len() * together, self.heads.kv_heads.div_ceil(key_heads));
        (fast.grid(kernel, blocks), together as i32)
    }
}
