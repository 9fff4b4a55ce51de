//! Sequences that are being decoded on a GPU.

use std::sync::Arc;

use relufy_ops::buffer::to_host;
use relufy_ops::decode::{BATCHES, Graph, Program, advance, argmax};
use relufy_spec::flops::Densities;

use super::counts::{counts, densities};
use super::engine::{GpuEngine, Packed};
use super::room::{Buffers, Masks};
use super::walk::Walk;
use crate::{Counts, Error, Result, Sequence};

/// Sequences side by side, 1, 2, 4 or 8: their keys and values, and room for one token of each.
/// Tokens go in one of each after the other, logits come out.
///
/// Sequences share the rows that are read: the union of what each needs. Keys and values are f32 in
/// an engine of [`Format::F32`](crate::Format::F32) and bf16 in others; they take memory for the
/// whole context at once.
pub struct GpuSession {
    // Before what it names, which is then freed last.
    step: Graph,
    /// A step and the likeliest token after it; captured when it is first asked for.
    greedy: Option<Graph>,
    /// A step as one kernel, of one sequence; else it is many.
    program: Option<Program>,
    pub(super) packed: Arc<Packed>,
    pub(super) buffers: Buffers,
    batch: usize,
    pub(super) lens: Vec<usize>,
    /// The positions that are on the GPU: kernels count them on.
    there: Vec<usize>,
    logits: Vec<f32>,
}

impl GpuSession {
    /// Empty sequences.
    ///
    /// # Errors
    /// Another number of sequences than 1, 2, 4 or 8; no memory.
    pub fn new(engine: &GpuEngine, batch: usize) -> Result<GpuSession> {
        GpuSession::masked(engine, batch, None, true)
    }

    /// The same, where each operation of a token is a kernel or two of its own: to compare with the
    /// one kernel of a single sequence. More sequences have no other way.
    ///
    /// # Errors
    /// As [`GpuSession::new`].
    pub fn by_kernels(engine: &GpuEngine, batch: usize) -> Result<GpuSession> {
        GpuSession::masked(engine, batch, None, false)
    }

    /// Empty sequences with forced zeros.
    pub(crate) fn masked(
        engine: &GpuEngine,
        batch: usize,
        masks: Option<Masks>,
        as_one: bool,
    ) -> Result<GpuSession> {
        if !BATCHES.contains(&batch) {
            return Err(Error::Batch(batch));
        }
        let packed = engine.packed.clone();
        let buffers = Buffers::new(&packed, batch, masks)?;
        let program = match as_one && batch == 1 {
            true => program(&packed, &buffers)?,
            false => None,
        };
        // Once directly, because nothing may be loaded while a graph is captured. What it writes
        // into the cache the first token overwrites.
        let queue = || queue_step(&packed, &buffers, program.as_ref());
        queue()?;
        let step = Graph::capture(&packed.device, queue)?;
        Ok(GpuSession {
            step,
            greedy: None,
            program,
            packed,
            buffers,
            batch,
            lens: vec![0; batch],
            there: vec![1; batch],
            logits: Vec::new(),
        })
    }

    /// Appends tokens to each sequence, as many as each is given; the logits `[batch, vocab]` after
    /// the last of each.
    ///
    /// The tokens in front of an empty sequence's last one go through the decoder that the engine
    /// was made of, if they are many; others one by one.
    ///
    /// # Errors
    /// No tokens for a sequence; another number of sequences; a token outside the vocabulary; more
    /// than the context holds. Nothing is appended then. A GPU that fails.
    pub fn prefill(&mut self, prompts: &[&[u32]]) -> Result<&[f32]> {
        self.check(prompts)?;
        let mut rest = prompts.to_vec();
        for (row, prompt) in rest.iter_mut().enumerate() {
            *prompt = &prompt[self.take_prompt(row, prompt)?..];
        }
        let rounds = rest.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        for round in (0..rounds).rev() {
            // Who has fewer tokens left waits: its place in the cache is written again.
            let next = |prompt: &&[u32]| prompt.len().checked_sub(round + 1).map(|at| prompt[at]);
            let tokens: Vec<_> = rest.iter().map(next).collect();
            let ids: Vec<u32> = tokens.iter().map(|token| token.unwrap_or(0)).collect();
            self.replay(&ids)?;
            let lens = self.lens.iter_mut().zip(tokens);
            lens.for_each(|(len, token)| *len += usize::from(token.is_some()));
        }
        self.download()
    }

    /// Appends one token to each sequence; the logits `[batch, vocab]` after it.
    ///
    /// # Errors
    /// As [`GpuSession::prefill`].
    pub fn step(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let prompts: Vec<&[u32]> = tokens.chunks(1).collect();
        self.check(&prompts)?;
        self.replay(tokens)?;
        self.lens.iter_mut().for_each(|len| *len += 1);
        self.download()
    }

    /// Appends one token to each sequence and then, `steps - 1` times, the likeliest after it (the
    /// lowest of equals): the tokens that would be next. The host is not asked in between.
    ///
    /// # Errors
    /// As [`GpuSession::prefill`].
    pub fn greedy(&mut self, tokens: &[u32], steps: usize) -> Result<Vec<u32>> {
        self.begin_greedy(tokens, steps)?;
        self.queue_greedy(steps)?;
        Ok(self.buffers.tokens.read()?)
    }

    /// Everything of [`GpuSession::greedy`] that is not decoding.
    pub(crate) fn begin_greedy(&mut self, tokens: &[u32], steps: usize) -> Result<()> {
        let prompts: Vec<&[u32]> = tokens.chunks(1).collect();
        self.check(&prompts)?;
        self.room_for(steps)?;
        if self.greedy.is_none() {
            // Loads its one kernel; the tokens are written below.
            argmax(&self.buffers.logits, &self.buffers.tokens)?;
            let (packed, buffers) = (&self.packed, &self.buffers);
            self.greedy = Some(Graph::capture(&packed.device, || {
                queue_step(packed, buffers, self.program.as_ref())?;
                Ok::<_, Error>(argmax(&buffers.logits, &buffers.tokens)?)
            })?);
        }
        self.place(tokens)
    }

    /// Queues the steps that [`GpuSession::begin_greedy`] prepared.
    pub(crate) fn queue_greedy(&mut self, steps: usize) -> Result<()> {
        let Some(graph) = &self.greedy else { return Ok(()) };
        for _ in 0..steps {
            graph.replay()?;
        }
        self.lens.iter_mut().chain(&mut self.there).for_each(|len| *len += steps);
        Ok(())
    }

    /// Forgets all but the first `len` tokens of each sequence.
    pub fn truncate(&mut self, len: usize) {
        self.lens.iter_mut().for_each(|own| *own = len.min(*own));
    }

    /// How many sequences there are.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// How many tokens each holds.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// How many more tokens fit the longest.
    pub fn left(&self) -> usize {
        self.packed.context - self.lens.iter().max().copied().unwrap_or(0)
    }

    /// What the last step did, all sequences together: of a prompt, its last token. A row that one
    /// of them needs is read once and multiplied for each.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn counts(&self) -> Result<Counts> {
        Ok(counts(&self.packed, self.batch, &self.buffers.counts.read()?))
    }

    /// The shares of what was not zero in any sequence in the last step, by site and layer; in a gated
    /// MLP those of open gates at `down`.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn densities(&self) -> Result<Densities> {
        Ok(densities(&self.packed, &self.buffers.counts.read()?))
    }

    /// The logits of the last step.
    pub(crate) fn download(&mut self) -> Result<&[f32]> {
        self.logits = to_host(&self.buffers.logits)?;
        Ok(&self.logits)
    }

    /// Begins one sequence anew with these tokens; the others stay as they are.
    pub(crate) fn begin(&mut self, row: usize, tokens: &[u32]) -> Result<()> {
        self.lens[row] = 0;
        if tokens.is_empty() {
            return Ok(());
        }
        let taken = self.take_prompt(row, tokens)?;
        for token in &tokens[taken..] {
            // Who waits has its place in the cache written again.
            let mut ids = vec![0; self.batch];
            ids[row] = *token;
            self.replay(&ids)?;
            self.lens[row] += 1;
        }
        Ok(())
    }

    /// Waits for everything that is queued.
    pub(crate) fn synchronize(&self) -> Result<()> {
        Ok(relufy_ops::device::synchronize(&self.packed.device)?)
    }

    /// The forced zeros.
    pub(crate) fn masks(&self) -> Option<&Masks> {
        self.buffers.masks.as_ref()
    }

    /// Queues a step with these tokens.
    fn replay(&mut self, tokens: &[u32]) -> Result<()> {
        self.place(tokens)?;
        self.step.replay()?;
        self.there.iter_mut().for_each(|at| *at += 1);
        Ok(())
    }

    /// Puts tokens and positions where kernels read them.
    fn place(&mut self, tokens: &[u32]) -> Result<()> {
        if self.there != self.lens {
            let positions: Vec<u32> = self.lens.iter().map(|len| *len as u32).collect();
            self.buffers.positions.write(&positions)?;
            self.there.clone_from(&self.lens);
        }
        Ok(self.buffers.tokens.write(tokens)?)
    }

    fn check(&self, prompts: &[&[u32]]) -> Result<()> {
        let (vocab, context) = (self.packed.spec.vocab, self.packed.context);
        if prompts.len() != self.batch {
            return Err(Error::Sequences { found: prompts.len(), expected: self.batch });
        }
        for (prompt, len) in prompts.iter().zip(&self.lens) {
            if prompt.is_empty() {
                return Err(Error::EmptyPrompt);
            }
            if let Some(&id) = prompt.iter().find(|id| **id as usize >= vocab) {
                return Err(Error::TokenOutOfRange { id, vocab });
            }
            let len = len + prompt.len();
            if len > context {
                return Err(Error::ContextFull { len, context });
            }
        }
        Ok(())
    }

    fn room_for(&self, steps: usize) -> Result<()> {
        let context = self.packed.context;
        match steps > self.left() {
            true => Err(Error::ContextFull { len: context - self.left() + steps, context }),
            false => Ok(()),
        }
    }
}

/// A step as one kernel, where there is one.
fn program(packed: &Packed, buffers: &Buffers) -> Result<Option<Program>> {
    let work = Walk { packed, buffers }.work();
    let words = (&buffers.positions, &buffers.counts);
    Ok(Program::new(&packed.device, packed.stored(), &work, words, &buffers.room)?)
}

/// Queues a step; its positions are then those of the next.
fn queue_step(packed: &Packed, buffers: &Buffers, program: Option<&Program>) -> Result<()> {
    match program {
        Some(program) => program.queue()?,
        None => {
            let work = Walk { packed, buffers }.work();
            work.iter().try_for_each(|each| each.queue(&buffers.room))?;
        }
    }
    Ok(advance(&buffers.positions)?)
}

impl Sequence for GpuSession {
    fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        GpuSession::prefill(self, &[tokens])
    }

    fn truncate(&mut self, len: usize) {
        GpuSession::truncate(self, len);
    }

    fn left(&self) -> usize {
        GpuSession::left(self)
    }

    fn counts(&self) -> Result<Counts> {
        GpuSession::counts(self)
    }
}
