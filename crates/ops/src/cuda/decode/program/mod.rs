//! A token's whole way as one kernel: its operations become the steps of a program that one block
//! on each multiprocessor goes through.

mod layout;
mod parts;
mod record;

use std::sync::Arc;

use candle_core::Device;

use super::super::{Gpu, Grid, Module, Scratch, module};
use super::launch::queue_together;
use super::{Format, Room, Words, Work};
use crate::error::Result;
use layout::{Layout, Ring};
use parts::{BRINGERS, Launch, THREADS};
use record::Recorder;

static MODULE: Module = module!("decode_program");
const OP: &str = "program of a token";

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
        let mut recorder = Recorder::new(&gpu, format, room, work.len());
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
        layout.spare(&mut steps, &mut passes, attending);
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
