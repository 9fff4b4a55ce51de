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

    /// A block's last rows of what follows attention come to memory that neither needs, while attention
    /// leaves the GPU's memory idle.
    pub(super) fn spare(&self, steps: &mut [Step], passes: &mut [Pass], attending: usize) {
        for n in 2..steps.len() {
            let step = &steps[n];
            let follows = steps[n - 1].kind == ATTEND && step.kind == ROWS && step.pairs == 0;
            let Some(pass) = passes.iter_mut().find(|pass| follows && pass.step == n as i32) else {
                continue;
            };
            // What enters, its lists, and attention's keys.
            let entering = self.flight + 4 * (step.stride[0] as usize).next_multiple_of(64);
            let lists = (step.lists + step.room) as usize - FIXED;
            let used = entering.max(lists).max(4 * PARTS + attending).next_multiple_of(128);
            let fit = (self.ring - FIXED).saturating_sub(used) / step.row_bytes as usize;
            // All are summed at once, and each block has so many.
            let rows = (fit as i32).min(step.own.each);
            if rows == 0 || step.own.each >= step.teams.room {
                continue;
            }
            pass.own.each -= rows;
            steps[n].spare = Spare { rows, byte: (FIXED + used) as i32, after: 0 };
            steps[n - 2].spare.after = n as i32;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A dense parallel block of Pythia 6.9B: attention, `up` behind a norm with a bias, `down`.
    #[test]
    fn spare_rows_lie_behind_lists() {
        let (hidden, ffn, attending) = (4096, 16384, 22_656);
        let rows = |inputs: usize, outputs: usize| {
            let mut step = Step { kind: ROWS, lists: 4 * inputs as i32, ..Step::default() };
            step.stride[0] = inputs as i64;
            step.row_bytes = 2 * inputs as i32;
            step.own.each = outputs as i32 / 132;
            step.teams.room = 512;
            step
        };
        let attend = Step { kind: ATTEND, ..Step::default() };
        let mut steps = [rows(hidden, 3 * hidden), attend, rows(hidden, ffn), rows(ffn, hidden)];
        let layout = Layout::new(&mut steps, attending);
        steps[2].room = 2 * 4 * hidden as i32;
        let mut passes = [Pass { step: 2, own: steps[2].own, ..Pass::default() }];
        layout.spare(&mut steps, &mut passes, attending);
        let (step, spare) = (&steps[2], &steps[2].spare);
        assert!(spare.rows > 0 && spare.byte >= step.lists + step.room);
        assert!((spare.byte + spare.rows * step.row_bytes) as usize <= layout.ring);
        assert_eq!(passes[0].own.each, step.own.each - spare.rows);
        assert_eq!(steps[0].spare.after, 2);
    }
}
