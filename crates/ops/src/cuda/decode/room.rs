//! Memory for sums that several blocks make together.

use candle_core::Device;

use super::super::{Gpu, Scratch};
use crate::error::Result;

/// Memory that kernels use for themselves: parts of sums, and how many of them are there. One is
/// enough for all layers, and kernels leave it as they found it; kernels that run at the same time
/// need one each.
pub struct Room {
    pub(super) partial: Scratch,
    /// Numbers that `partial` holds.
    pub(super) floats: usize,
    pub(super) counters: Scratch,
}

impl Room {
    /// The most parts of a sum of columns.
    pub(super) const SHARES: usize = 32;
    /// Tiles of columns, and heads times batch, that are counted at a time.
    pub(super) const COUNTERS: usize = 16 << 10;
    /// The most parts of a head's keys.
    pub(super) const SPLITS: usize = 16;

    /// Room for batches of up to `batch` rows, matrices by input of up to `outputs` columns, and
    /// attention of up to `heads` heads of up to `head_dim` columns.
    ///
    /// # Errors
    /// A device that is no GPU; no memory.
    pub fn new(
        device: &Device,
        batch: usize,
        outputs: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Room> {
        const OP: &str = "room for decoding";
        let gpu = Gpu::on(device)?;
        // A head's part is its sum over values, its largest score and the sum of its weights.
        let attention = heads * Room::SPLITS * (head_dim + 2);
        let floats = batch * (Room::SHARES * outputs.next_multiple_of(64)).max(attention);
        let partial = gpu.scratch(4 * floats, OP)?;
        let counters = gpu.scratch(4 * Room::COUNTERS, OP)?;
        gpu.zero(counters.ptr, 4 * Room::COUNTERS, OP)?;
        Ok(Room { partial, floats, counters })
    }
}
