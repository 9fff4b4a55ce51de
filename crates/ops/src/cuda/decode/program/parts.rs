//! What a program is made of, as the kernel has it in `cu/program.cuh`.

use super::super::attention::Attend;
use super::super::input::Feed;
use super::super::project::Out;
use super::super::token::Embed;

// As in `cu/program.cuh`.
pub(super) const WARPS: usize = 16;
pub(super) const THREADS: usize = 32 * WARPS;
/// Inputs of a row that a lane has, at most.
pub(super) const HELD: usize = 32;
pub(super) const OWN: usize = 2048;
pub(super) const OPEN: usize = 512;
/// `Fixed`, and a little more.
pub(super) const FIXED: usize = 17 << 10;
/// Slots of the ring and their bytes, at most, and warps of which a thread fills them.
pub(super) const SLOTS: usize = 32;
pub(super) const SLOT: usize = 8 << 10;
pub(super) const BRINGERS: usize = 3;
/// Pieces of rows on their way.
pub(super) const PIECE: usize = 16 * THREADS;
pub(super) const FLIGHT: usize = 6 * PIECE;
/// Numbers for parts of sums, where columns are summed and where only rows are.
pub(super) const PARTS: usize = 16 * THREADS;
pub(super) const ROW_PARTS: usize = 4 * THREADS;
/// Widths are multiples of this: inputs are read as vectors.
pub(super) const WHOLE: usize = 8;

/// Kinds of steps.
pub(super) const EMBED: i32 = 0;
pub(super) const ADD: i32 = 1;
pub(super) const ROWS: i32 = 2;
pub(super) const NEURONS: i32 = 3;
pub(super) const ATTEND: i32 = 4;

/// `Own` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Own {
    pub(super) each: i32,
    pub(super) more: i32,
}

/// `Spare` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Spare {
    pub(super) rows: i32,
    pub(super) byte: i32,
    pub(super) after: i32,
}

/// `Pass` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Pass {
    pub(super) weights: u64,
    pub(super) own: Own,
    pub(super) row_bytes: i32,
    pub(super) pieces: i32,
    pub(super) listed: i32,
    pub(super) step: i32,
}

/// `Teams` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Teams {
    pub(super) size: i32,
    pub(super) count: i32,
    pub(super) pieces: i32,
    pub(super) warps: i32,
    pub(super) room: i32,
    pub(super) by_size: u32,
    pub(super) by_warps: u32,
}

/// `Columns` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Columns {
    pub(super) lanes: i32,
    pub(super) groups: i32,
    pub(super) parts: i32,
    pub(super) by_lanes: u32,
    pub(super) by_width: u32,
    pub(super) by_fours: u32,
}

/// What a number below [`THREADS`] is multiplied by instead of a division: see `divided` of
/// `cu/program_ring.cuh`.
pub(super) fn inverse(divisor: usize) -> u32 {
    (1usize << 20).div_ceil(divisor) as u32
}

/// `Step` of `cu/program.cuh`: copied in 16 bytes at a time.
#[repr(C, align(16))]
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    pub(super) kind: i32,
    pub(super) by_input: i32,
    pub(super) pairs: i32,
    pub(super) join: i32,
    pub(super) number: i32,
    pub(super) last: i32,
    pub(super) row_bytes: i32,
    pub(super) lists: i32,
    pub(super) room: i32,
    pub(super) feed: Feed,
    pub(super) out: Out,
    pub(super) own: Own,
    pub(super) teams: Teams,
    pub(super) spare: Spare,
    pub(super) columns: Columns,
    pub(super) weights: [u64; 2],
    pub(super) scales: [u64; 2],
    pub(super) stride: [i64; 2],
    pub(super) up_bias: u64,
    pub(super) mask: u64,
    pub(super) counts: u64,
    pub(super) before: u64,
    pub(super) act: i32,
    pub(super) act_p: f32,
    pub(super) then: i32,
    pub(super) then_p: f32,
    pub(super) shares: i32,
    pub(super) attend: Attend,
    pub(super) embed: Embed,
}

/// `Program` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Launch {
    pub(super) steps: u64,
    pub(super) passes: u64,
    pub(super) arrived: u64,
    pub(super) positions: u64,
    pub(super) counts: u64,
    pub(super) step_count: i32,
    pub(super) pass_count: i32,
    pub(super) words: i32,
    pub(super) flight: i32,
    pub(super) ring: i32,
    pub(super) slot_bytes: i32,
    pub(super) slots: i32,
}
