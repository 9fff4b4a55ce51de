//! From operations to steps.

use std::collections::HashMap;

use super::super::input::Feed;
use super::super::project::Out;
use super::super::{COUNTS, Format, GpuMatrix, Input, Output, Room, UpRows, Work, numbers_or_null};
use super::OP;
use super::parts::*;
use crate::cuda::pointwise::curve_code;
use crate::cuda::{Gpu, Scratch};
use crate::error::Result;

/// Weights of 16 bytes.
fn vector(format: Format) -> usize {
    16 / format.bytes()
}

pub(super) struct Recorder<'a> {
    gpu: &'a Gpu,
    blocks: usize,
    format: Format,
    room: &'a Room,
    /// Operations in all.
    count: usize,
    /// What blocks tell each other: memory of each step's results.
    pub(super) mail: Vec<Scratch>,
    /// Where the numbers of an operation's tensor were told last, and how many.
    told: HashMap<u64, (u64, usize)>,
    pub(super) steps: Vec<Step>,
    pub(super) passes: Vec<Pass>,
    /// Bytes that attention needs.
    pub(super) attending: usize,
    pub(super) fits: bool,
    /// The last attention, whose result the next step may have to join.
    attended: Option<Step>,
}

impl<'a> Recorder<'a> {
    /// For `count` operations.
    pub(super) fn new(gpu: &'a Gpu, format: Format, room: &'a Room, count: usize) -> Recorder<'a> {
        Recorder {
            gpu,
            blocks: gpu.processors as usize,
            format,
            room,
            count,
            mail: Vec::new(),
            told: HashMap::new(),
            steps: Vec::new(),
            passes: Vec::new(),
            attending: 0,
            fits: true,
            attended: None,
        }
    }

    pub(super) fn record(&mut self, work: &Work<'_>) -> Result<()> {
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
                    true => self.add(&mut step, matrix),
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
                super::super::matrix::ensure_alike(gate, up, OP)?;
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
            Work::PairsByInput(it) => {
                it.check()?;
                let feed = self.feed(&it.input, it.matrix.rows())?;
                let ffn = it.products.elem_count();
                let out = Output::new(it.products, it.biases[0]).out(1, ffn, OP)?;
                let mut step = Step { pairs: 1, ..self.giving(feed, out)? };
                step.up_bias = numbers_or_null(it.biases[1], ffn, "bias of up", OP)?;
                step.mask = numbers_or_null(it.mask, ffn, "mask", OP)?;
                step.counts = it.counts.map_or(Ok(0), |(words, at)| words.at(at, COUNTS, OP))?;
                (step.act, step.act_p) = curve_code(it.activation);
                (step.then, step.then_p) = curve_code(it.then);
                self.name(&mut step, 0, it.matrix);
                self.add(&mut step, it.matrix);
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

    fn feed(&mut self, input: &Input<'_>, width: usize) -> Result<Feed> {
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
    fn lanes(&mut self, step: &mut Step, matrix: &GpuMatrix) {
        let vectors = matrix.cols().div_ceil(vector(self.format));
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
            by_fours: inverse(4 * lanes),
        };
    }

    fn add(&mut self, step: &mut Step, matrix: &GpuMatrix) {
        let inputs = matrix.rows();
        step.kind = ADD;
        step.by_input = 1;
        self.lanes(step, matrix);
        // The values of all, and a list of places.
        step.lists = (4 * inputs.next_multiple_of(64) + 2 * inputs) as i32;
    }

    fn rows(&mut self, step: &mut Step, matrices: &[&GpuMatrix]) {
        step.kind = ROWS;
        for matrix in matrices {
            self.pass(matrix, false);
            step.lists = 4 * matrix.stride().next_multiple_of(64) as i32;
            step.row_bytes = (matrix.stride() * self.format.bytes()) as i32;
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
                self.lanes(step, gate);
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
