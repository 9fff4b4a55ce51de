//! Where things lie in a block's shared memory.

use super::super::Format;
use super::parts::*;

/// How a block's shared memory is shared out.
pub(super) struct Layout {
    /// Bytes of pieces on their way, which have the place of parts of sums and of lists as well.
    pub(super) flight: usize,
    /// Numbers for parts of sums.
    pub(super) parts: usize,
    /// Bytes in front of the ring.
    pub(super) ring: usize,
}

impl Layout {
    /// The one for these steps, whose [`Step::lists`] are bytes of what enters so far, and then places.
    pub(super) fn new(steps: &mut [Step], attending: usize) -> Layout {
        let by_input = steps.iter().any(|step| step.by_input != 0);
        // Where nothing is read by input only sums have parts there, and lists lie behind what enters.
        let (flight, parts) = if by_input { (FLIGHT, PARTS) } else { (4 * ROW_PARTS, ROW_PARTS) };
        // Attention's keys come to as many bytes in any case.
        let mut bytes = 4 * PARTS + attending;
        for step in steps.iter_mut() {
            let entering = (step.lists as usize).next_multiple_of(16);
            let lists =
                step.feed.parameters() * (4 * step.feed.width as usize).next_multiple_of(16);
            (step.lists, step.room) = match by_input {
                true => (FIXED as i32, flight as i32),
                false => ((FIXED + flight + entering) as i32, lists as i32),
            };
            bytes = bytes.max(flight + entering + if by_input { 0 } else { lists });
        }
        Layout { flight, parts, ring: FIXED + bytes.next_multiple_of(128) }
    }
}

/// Where rows wait for their turn: so many slots of so many bytes.
pub(super) struct Ring {
    pub(super) slots: usize,
    pub(super) slot: usize,
    /// Bytes of a row that a warp reads.
    pub(super) warp: usize,
}

impl Ring {
    /// The ring of most bytes that this memory has room for. The shortest rows fill their slots, whole
    /// or in pieces; longer ones come in more of them.
    pub(super) fn new(passes: &[Pass], format: Format, free: usize) -> Ring {
        let warp = 32 * HELD * format.bytes();
        let shortest = passes.iter().map(|pass| pass.row_bytes as usize).min().unwrap_or(warp);
        let of_pieces = |pieces: usize| {
            let slot = shortest.div_ceil(pieces).next_multiple_of(warp);
            Ring { slots: (free / slot).min(SLOTS) / BRINGERS * BRINGERS, slot, warp }
        };
        let pieces = shortest.div_ceil(SLOT);
        let (whole, halves) = (of_pieces(pieces), of_pieces(2 * pieces));
        if halves.bytes() > whole.bytes() { halves } else { whole }
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots * self.slot
    }

    /// How rows come through the ring.
    pub(super) fn share_out(&self, steps: &mut [Step], passes: &mut [Pass], parts: usize) {
        for pass in passes.iter_mut() {
            pass.pieces = (pass.row_bytes as usize).div_ceil(self.slot) as i32;
        }
        let mut passes = passes.iter();
        for step in steps {
            let rows = match step.kind {
                ROWS => 1 + step.pairs,
                NEURONS => 2 - step.by_input,
                _ => 0,
            };
            // Those of one step are alike.
            if let Some(pass) = passes.by_ref().take(rows as usize).last() {
                step.teams = self.teams(pass, parts);
            }
        }
    }

    fn teams(&self, pass: &Pass, parts: usize) -> Teams {
        let size = (pass.row_bytes as usize).div_ceil(self.warp);
        let (count, warps) = (WARPS / size, (self.slot / self.warp).min(size));
        Teams {
            size: size as i32,
            count: count as i32,
            pieces: pass.pieces,
            warps: warps as i32,
            room: (parts / size / count * count) as i32,
            by_size: inverse(size),
            by_warps: inverse(warps),
        }
    }
}
