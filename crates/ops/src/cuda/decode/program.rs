//! A token's whole way as one kernel: its operations become the steps of a program that one block
//! on each multiprocessor goes through.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Device;

use super::super::pointwise::curve_code;
use super::super::{Gpu, Grid, Module, Scratch, module};
use super::attention::Attend;
use super::input::Feed;
use super::launch::queue_together;
use super::project::Out;
use super::token::Embed;
use super::{COUNTS, Format, GpuMatrix, Output, Room, UpRows, Words, Work, numbers_or_null};
use crate::error::Result;

static MODULE: Module = module!("decode_program");
const OP: &str = "program of a token";

// As in `cu/program.cuh`.
const WARPS: usize = 16;
const THREADS: usize = 32 * WARPS;
/// Inputs of a row that a lane has, at most.
const HELD: usize = 32;
const OWN: usize = 2048;
const OPEN: usize = 512;
/// `Fixed`, and a little more.
const FIXED: usize = 17 << 10;
/// Slots of the ring and their bytes, at most, and warps of which a thread fills them.
const SLOTS: usize = 32;
const SLOT: usize = 8 << 10;
const BRINGERS: usize = 3;
/// Pieces of rows on their way.
const PIECE: usize = 16 * THREADS;
const FLIGHT: usize = 6 * PIECE;
/// Numbers for parts of sums, where columns are summed and where only rows are.
const PARTS: usize = 16 * THREADS;
const ROW_PARTS: usize = 4 * THREADS;
/// Widths are multiples of this: inputs are read as vectors.
const WHOLE: usize = 8;

/// Kinds of steps.
const EMBED: i32 = 0;
const ADD: i32 = 1;
const ROWS: i32 = 2;
const NEURONS: i32 = 3;
const ATTEND: i32 = 4;

/// `Own` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Own {
    each: i32,
    more: i32,
}

/// `Pass` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Pass {
    weights: u64,
    own: Own,
    row_bytes: i32,
    pieces: i32,
    listed: i32,
    step: i32,
}

/// `Teams` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Teams {
    size: i32,
    count: i32,
    pieces: i32,
    warps: i32,
    room: i32,
    by_size: u32,
    by_warps: u32,
}

/// `Columns` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Columns {
    lanes: i32,
    groups: i32,
    parts: i32,
    by_lanes: u32,
    by_width: u32,
}

/// What a number below [`THREADS`] is multiplied by instead of a division: see `divided` of
/// `cu/program_ring.cuh`.
fn inverse(divisor: usize) -> u32 {
    (1usize << 20).div_ceil(divisor) as u32
}

/// `Step` of `cu/program.cuh`: copied in 16 bytes at a time.
#[repr(C, align(16))]
#[derive(Clone, Copy, Default)]
struct Step {
    kind: i32,
    by_input: i32,
    pairs: i32,
    join: i32,
    number: i32,
    last: i32,
    lists: i32,
    room: i32,
    feed: Feed,
    out: Out,
    own: Own,
    teams: Teams,
    columns: Columns,
    weights: [u64; 2],
    scales: [u64; 2],
    stride: [i64; 2],
    up_bias: u64,
    mask: u64,
    counts: u64,
    before: u64,
    act: i32,
    act_p: f32,
    then: i32,
    then_p: f32,
    shares: i32,
    attend: Attend,
    embed: Embed,
}

/// `Program` of `cu/program.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Launch {
    steps: u64,
    passes: u64,
    arrived: u64,
    positions: u64,
    counts: u64,
    step_count: i32,
    pass_count: i32,
    words: i32,
    flight: i32,
    ring: i32,
    slot_bytes: i32,
    slots: i32,
}

/// One sequence's token as one kernel. It reads the weights, caches and words that its operations name,
/// and writes caches, counts and the last one's result, all of which must outlive it. Other results
/// stay in memory of its own.
///
/// Beside the same operations as kernels it is faster because nothing is started between them, and
/// because rows of weights that are read in any case are under way long before their turn.
pub struct Program {
    gpu: Arc<Gpu>,
    launch: Launch,
    name: String,
    grid: Grid,
    _kept: Vec<Scratch>,
}

impl Program {
    /// A program of these operations of one sequence; `None` where it has no kernel: before Hopper,
    /// for shapes that a block's memory does not hold, and for operations that do not begin with an
    /// embedding, end with a matrix, and read results of those between.
    ///
    /// `positions` has the sequence's length, and `counts` all that the operations count: it is
    /// cleared first.
    ///
    /// # Errors
    /// Shapes that do not fit; more than one sequence; no memory.
    pub fn new(
        device: &Device,
        format: Format,
        work: &[Work<'_>],
        (positions, counts): (&Words, &Words),
        room: &Room,
    ) -> Result<Option<Program>> {
        let gpu = Gpu::on(device)?;
        if !gpu.overlaps {
            return Ok(None);
        }
        let mut recorder = Recorder {
            gpu: &gpu,
            blocks: gpu.processors as usize,
            format,
            room,
            count: work.len(),
            mail: Vec::new(),
            told: HashMap::new(),
            steps: Vec::new(),
            passes: Vec::new(),
            attending: 0,
            fits: true,
            attended: None,
        };
        for each in work {
            recorder.record(each)?;
        }
        let Recorder { mut steps, mut passes, attending, mut fits, mail: mut kept, .. } = recorder;
        let layout = Layout::new(&mut steps, attending);
        let ring = Ring::new(&passes, format, gpu.shared_memory(OP)?.saturating_sub(layout.ring));
        let begins = work.first().is_some_and(|first| matches!(first, Work::Embed(_)));
        fits &= begins && steps.last().is_some_and(|step| step.last != 0);
        if !fits || ring.slots < BRINGERS {
            return Ok(None);
        }
        ring.share_out(&mut steps, &mut passes, layout.parts);
        let arrived = gpu.scratch(8, OP)?;
        gpu.zero(arrived.ptr, 8, OP)?;
        let there = |bytes: usize| gpu.scratch(bytes, OP);
        let (on_steps, on_passes) =
            (there(size_of_val(&steps[..]))?, there(size_of_val(&passes[..]).max(1))?);
        gpu.write(&steps, on_steps.ptr, OP)?;
        gpu.write(&passes, on_passes.ptr, OP)?;
        let launch = Launch {
            steps: on_steps.ptr,
            passes: on_passes.ptr,
            arrived: arrived.ptr,
            positions: positions.at(0, 1, OP)?,
            counts: counts.at(0, counts.len(), OP)?,
            step_count: steps.len() as i32,
            pass_count: passes.len() as i32,
            words: counts.len() as i32,
            flight: layout.flight as i32,
            ring: layout.ring as i32,
            slot_bytes: ring.slot as i32,
            slots: ring.slots as i32,
        };
        let threads = (THREADS + 32 * (BRINGERS + 1)) as u32;
        let grid = Grid::new(gpu.processors as usize, threads).shared(layout.ring + ring.bytes());
        let name = format!("program_{}", format.name());
        kept.extend([on_steps, on_passes, arrived]);
        Ok(Some(Program { gpu, launch, name, grid, _kept: kept }))
    }

    /// Queues the token.
    ///
    /// # Errors
    /// An error of the GPU.
    pub fn queue(&self) -> Result<()> {
        queue_together(&self.gpu, OP, (&MODULE, &self.name), self.grid, &self.launch)
    }
}

/// How a block's shared memory is shared out.
struct Layout {
    /// Bytes of pieces on their way, which have the place of parts of sums and of lists as well.
    flight: usize,
    /// Numbers for parts of sums.
    parts: usize,
    /// Bytes in front of the ring.
    ring: usize,
}

impl Layout {
    /// The one for these steps, whose [`Step::lists`] are bytes of what enters so far, and then places.
    fn new(steps: &mut [Step], attending: usize) -> Layout {
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
struct Ring {
    slots: usize,
    slot: usize,
    /// Bytes of a row that a warp reads.
    warp: usize,
}

impl Ring {
    /// The ring of most bytes that this memory has room for. The shortest rows fill their slots, whole
    /// or in pieces; longer ones come in more of them.
    fn new(passes: &[Pass], format: Format, free: usize) -> Ring {
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

    fn bytes(&self) -> usize {
        self.slots * self.slot
    }

    /// How rows come through the ring.
    fn share_out(&self, steps: &mut [Step], passes: &mut [Pass], parts: usize) {
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

/// Weights of 16 bytes.
fn vector(format: Format) -> usize {
    16 / format.bytes()
}

struct Recorder<'a> {
    gpu: &'a Gpu,
    blocks: usize,
    format: Format,
    room: &'a Room,
    /// Operations in all.
    count: usize,
    /// What blocks tell each other: memory of each step's results.
    mail: Vec<Scratch>,
    /// Where the numbers of an operation's tensor were told last, and how many.
    told: HashMap<u64, (u64, usize)>,
    steps: Vec<Step>,
    passes: Vec<Pass>,
    /// Bytes that attention needs.
    attending: usize,
    fits: bool,
    /// The last attention, whose result the next step may have to join.
    attended: Option<Step>,
}

impl Recorder<'_> {
    fn record(&mut self, work: &Work<'_>) -> Result<()> {
        let mut step = match *work {
            Work::Embed(it) => {
                let (batch, embed) = it.embed()?;
                let table = if self.format == Format::F32 { Format::F32 } else { Format::Bf16 };
                self.fits &= batch == 1 && it.table.format() == table;
                let mut step = Step { kind: EMBED, embed, ..Step::default() };
                step.embed.x = self.tell(embed.x, embed.width as usize)?;
                step
            }
            Work::Project { input, matrix, by_input, output } => {
                let inputs = if by_input { matrix.rows() } else { matrix.cols() };
                let feed = self.feed(&input, inputs)?;
                let outputs = if by_input { matrix.cols() } else { matrix.rows() };
                let mut step = self.giving(feed, output.out(1, outputs, OP)?)?;
                self.name(&mut step, 0, matrix);
                match by_input {
                    true => self.add(&mut step, inputs),
                    false => self.rows(&mut step, &[matrix]),
                }
                step
            }
            Work::GateAndUp {
                input,
                gate: (gate, gate_bias),
                up: (up, up_bias),
                curves,
                products,
            } => {
                super::matrix::ensure_alike(gate, up, OP)?;
                let feed = self.feed(&input, gate.cols())?;
                let out = Output::new(products, gate_bias).out(1, gate.rows(), OP)?;
                let up_bias = numbers_or_null(up_bias, up.rows(), "bias of up", OP)?;
                let mut step = Step { up_bias, pairs: 1, ..self.giving(feed, out)? };
                (step.act, step.act_p) = curve_code(curves.0);
                (step.then, step.then_p) = curve_code(curves.1);
                self.name(&mut step, 0, gate);
                self.name(&mut step, 1, up);
                self.rows(&mut step, &[gate, up]);
                step
            }
            Work::Neurons { input, gate, by_input, bias, up } => {
                let feed = self.feed(&input, up.up.cols())?;
                let out = Output::new(up.products, bias).out(1, up.up.rows(), OP)?;
                let mut step = self.giving(feed, out)?;
                self.name(&mut step, 0, gate);
                self.neurons(&mut step, gate, by_input, &up)?;
                step
            }
            Work::Attend(it) => {
                let group = it.group();
                let wide = if group == 1 {
                    1
                } else if group <= 4 {
                    4
                } else {
                    8
                };
                let (batch, mut attend) = it.attend(wide, self.room)?;
                let units = attend.kv_heads as usize * attend.chunks as usize;
                let dim = attend.head_dim as usize;
                // Shares are joined in fours.
                let shares = match dim % 4 {
                    0 => (self.blocks / units.max(1)).clamp(1, Room::SPLITS),
                    _ => 1,
                };
                let fits = units <= self.blocks && attend.heads as usize * shares <= ROW_PARTS;
                self.fits &= batch == 1 && fits;
                // `Attending` of `cu/program_attention.cuh`.
                let room = 4 * (256 * (wide + 2 + WARPS + 1 + 2) + 2 * WARPS);
                self.attending = self.attending.max(room);
                let heads = attend.heads as usize;
                attend.qkv = self.told(attend.qkv, (heads + 2 * attend.kv_heads as usize) * dim);
                let out = self.tell_in(attend.out, heads * dim, shares)?;
                attend.partial = self.tell(out, 2 * heads * shares)?;
                attend.out = out;
                let step = Step { kind: ATTEND, attend, shares: shares as i32, ..Step::default() };
                self.attended = Some(step);
                step
            }
        };
        if let Some(before) = self.attended.filter(|it| it.attend.out == step.feed.x) {
            step.attend = before.attend;
            step.shares = before.shares;
            step.join = i32::from(before.shares > 1);
        }
        step.number = self.steps.len() as i32;
        self.steps.push(step);
        Ok(())
    }

    /// Where the operations' last results of this address are told.
    fn told(&mut self, buffer: u64, len: usize) -> u64 {
        let found = self.told.get(&buffer).filter(|(_, known)| *known == len);
        self.fits &= found.is_some();
        found.map_or(0, |(mail, _)| *mail)
    }

    /// Memory for the operations' results of this address.
    fn tell(&mut self, buffer: u64, len: usize) -> Result<u64> {
        self.tell_in(buffer, len, 1)
    }

    /// The same in several parts one behind the other.
    fn tell_in(&mut self, buffer: u64, len: usize, parts: usize) -> Result<u64> {
        let bytes = 4 * len * parts;
        let mail = self.gpu.scratch(bytes, OP)?;
        self.gpu.zero(mail.ptr, bytes, OP)?;
        self.told.insert(buffer, (mail.ptr, len));
        let at = mail.ptr;
        self.mail.push(mail);
        Ok(at)
    }

    /// A step with a matrix. The results of the last one go where its operation names, others' to the
    /// program's own memory.
    fn giving(&mut self, feed: Feed, mut out: Out) -> Result<Step> {
        let len = out.outputs as usize;
        let before = if out.add != 0 { self.told(out.y, len) } else { 0 };
        let last = self.steps.len() + 1 == self.count;
        if !last {
            out.y = self.tell(out.y, len)?;
        }
        Ok(Step { feed, out, before, last: i32::from(last), ..Step::default() })
    }

    fn feed(&mut self, input: &super::Input<'_>, width: usize) -> Result<Feed> {
        let (batch, mut feed) = input.feed(OP)?;
        crate::buffer::ensure_shape(input.x, OP, "x", &[batch, width])?;
        self.fits &= batch == 1 && width < 1 << 16 && width.is_multiple_of(WHOLE);
        feed.x = self.told(feed.x, width);
        Ok(feed)
    }

    fn name(&mut self, step: &mut Step, which: usize, matrix: &GpuMatrix) {
        step.weights[which] = matrix.data();
        step.scales[which] = matrix.scales();
        step.stride[which] = matrix.stride() as i64;
        self.fits &= matrix.format() == self.format;
    }

    /// Columns that a block has of every row.
    fn lanes(&mut self, step: &mut Step) {
        let vectors = (step.out.outputs as usize).div_ceil(vector(self.format));
        let lanes = vectors.div_ceil(self.blocks);
        // Memory comes in 32 bytes: halves of them are worth a few blocks without columns, if those are
        // few.
        let lanes = if lanes < 8 { lanes } else { lanes.next_multiple_of(2) };
        self.fits &= lanes * vector(self.format) <= THREADS;
        let (groups, width) = (THREADS / lanes, lanes * vector(self.format));
        step.columns = Columns {
            lanes: lanes as i32,
            groups: groups as i32,
            parts: (groups / 8).clamp(1, (THREADS / width).clamp(1, 8)) as i32,
            by_lanes: inverse(lanes),
            by_width: inverse(width),
        };
    }

    fn add(&mut self, step: &mut Step, inputs: usize) {
        step.kind = ADD;
        step.by_input = 1;
        self.lanes(step);
        // The values of all, and a list of places.
        step.lists = (4 * inputs.next_multiple_of(64) + 2 * inputs) as i32;
    }

    fn rows(&mut self, step: &mut Step, matrices: &[&GpuMatrix]) {
        step.kind = ROWS;
        for matrix in matrices {
            self.pass(matrix, false);
            step.lists = 4 * matrix.stride().next_multiple_of(64) as i32;
        }
        step.own = self.own(step.out.outputs as usize);
        let own = (step.out.outputs as usize).div_ceil(self.blocks);
        self.fits &= matrices.len() * own <= OWN;
    }

    fn neurons(
        &mut self,
        step: &mut Step,
        gate: &GpuMatrix,
        by_input: bool,
        up: &UpRows<'_>,
    ) -> Result<()> {
        let ffn = up.up.rows();
        step.kind = NEURONS;
        step.by_input = i32::from(by_input);
        step.mask = numbers_or_null(up.mask, ffn, "mask", OP)?;
        step.up_bias = numbers_or_null(up.bias, ffn, "bias of up", OP)?;
        step.counts = up.counts.map_or(Ok(0), |(words, at)| words.at(at, COUNTS, OP))?;
        (step.act, step.act_p) = curve_code(up.activation);
        (step.then, step.then_p) = curve_code(up.then);
        self.name(step, 1, up.up);
        let inputs = up.up.stride().next_multiple_of(64);
        let list = match by_input {
            true => {
                self.lanes(step);
                // Of int8 also the values times units.
                (if step.scales[0] == 0 { 2 } else { 6 }) * inputs
            }
            false => {
                self.pass(gate, false);
                step.own = self.own(ffn);
                self.fits &= ffn.div_ceil(self.blocks) <= OPEN;
                0
            }
        };
        step.lists = (4 * inputs + list) as i32;
        self.pass(up.up, true);
        Ok(())
    }

    fn own(&self, rows: usize) -> Own {
        Own { each: (rows / self.blocks) as i32, more: (rows % self.blocks) as i32 }
    }

    fn pass(&mut self, matrix: &GpuMatrix, listed: bool) {
        self.fits &= matrix.stride() <= 32 * WARPS * HELD;
        self.passes.push(Pass {
            weights: matrix.data(),
            own: self.own(matrix.rows()),
            row_bytes: (matrix.stride() * self.format.bytes()) as i32,
            pieces: 0,
            listed: i32::from(listed),
            step: self.steps.len() as i32,
        });
    }
}
