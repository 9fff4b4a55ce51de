//! The kernels of `cu/attention_*.cu`: the tiles, threads and shared memory of each head size.

use super::OP;
use crate::cuda::Grid;
use crate::error::{Error, Result};

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// The output and the log-sum-exps.
    Forward,
    /// The gradients of keys and values.
    Keys,
    /// The gradient of queries.
    Queries,
}

impl Kernel {
    /// As kernels are named.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kernel::Forward => "forward",
            Kernel::Keys => "keys",
            Kernel::Queries => "queries",
        }
    }

    /// Tensors of which a block holds its own rows.
    fn owned_tensors(self) -> usize {
        if self == Kernel::Forward { 1 } else { 2 }
    }
}

/// The kernels of a head size.
pub(super) enum Kernels {
    Fast(&'static Fast),
    Exact(Exact),
}

impl Kernels {
    /// Rows that a block owns.
    pub(super) fn owned(&self) -> usize {
        match self {
            Kernels::Fast(_) => Fast::OWNED,
            Kernels::Exact(exact) => exact.owned(),
        }
    }
}

/// Those on the tensor cores, for bf16.
pub(super) struct Fast {
    head_dim: usize,
    /// Threads of a block, by [`Kernel`].
    threads: [u32; 3],
    /// Rows of a tile that a block walks, by [`Kernel`].
    walked: [usize; 3],
    /// Blocks that share the columns of the keys' gradients.
    pub(super) parts: usize,
    /// Blocks for the gradients of keys that a multiprocessor runs at a time.
    pub(super) resident: usize,
}

impl Fast {
    /// Rows that a block owns.
    pub(super) const OWNED: usize = 128;

    /// Those of a head size.
    pub(super) fn of(head_dim: usize) -> Option<&'static Fast> {
        FAST.iter().find(|fast| fast.head_dim == head_dim)
    }

    /// A kernel's blocks: their threads and shared memory, for two stages of what it walks.
    pub(super) fn grid(&self, kernel: Kernel, blocks: (usize, usize)) -> Grid {
        let row = (self.head_dim + 8) * 2;
        let walked = self.walked[kernel as usize];
        let sums = if kernel == Kernel::Keys { 4 * walked * 4 } else { 0 };
        let bytes = (kernel.owned_tensors() * Fast::OWNED + 4 * walked) * row + sums;
        grid(blocks, self.threads[kernel as usize]).shared(bytes)
    }
}

const FAST: [Fast; 5] = [
    Fast { head_dim: 64, threads: [128, 128, 128], walked: [64, 64, 64], parts: 1, resident: 2 },
    Fast { head_dim: 80, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 96, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 128, threads: [128, 256, 128], walked: [64, 64, 32], parts: 1, resident: 1 },
    Fast { head_dim: 256, threads: [256, 256, 256], walked: [64, 32, 32], parts: 2, resident: 1 },
];

/// The others, in f32 arithmetic.
pub(super) struct Exact {
    /// Columns in units of 32, as kernels are named.
    pub(super) units: usize,
}

impl Exact {
    const WALKED: usize = 32;
    /// The widest heads that have kernels.
    const WIDEST: usize = 512;

    /// Those of a head size.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for heads of more than 512 columns.
    pub(super) fn of(head_dim: usize) -> Result<Exact> {
        if head_dim > Exact::WIDEST {
            let what = format!("heads of {head_dim} columns on a GPU");
            return Err(Error::Unsupported { op: OP, what });
        }
        Ok(Exact { units: head_dim.div_ceil(32).next_power_of_two() })
    }

    /// Rows that a block owns.
    pub(super) fn owned(&self) -> usize {
        if self.units <= 8 { 32 } else { 16 }
    }

    /// A kernel's blocks.
    pub(super) fn grid(&self, kernel: Kernel, blocks: (usize, usize)) -> Grid {
        let width = self.units * 32;
        let floats =
            kernel.owned_tensors() * self.owned() * width + 2 * Exact::WALKED * (width + 1);
        grid(blocks, 256).shared(floats * 4)
    }
}

/// Blocks in two dimensions.
pub(super) fn grid(blocks: (usize, usize), threads: u32) -> Grid {
    Grid { blocks: (blocks.0 as u32, blocks.1 as u32, 1), ..Grid::new(0, threads) }
}
