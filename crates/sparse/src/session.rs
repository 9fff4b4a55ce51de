//! One sequence that is being decoded.

use std::sync::Arc;

use relufy_spec::flops::SiteDensities;

use crate::batch::{Batch, BatchRoom, LEAST, MOST};
use crate::counts::{Counts, Nonzeros};
use crate::engine::{Engine, Packed};
use crate::force::Forced;
use crate::linear::Input;
use crate::matrix::padded;
use crate::shared::{KvRows, PerWorker, SharedVec};
use crate::walk::{Lane, Walk};
use crate::{Error, Format, Result};

/// So many tokens of a prompt walk side by side.
const FEW: usize = 16;

/// A sequence: its keys and values, and room for one token's activations. Tokens go in one after
/// the other, logits come out.
///
/// Keys and values are f32 in an engine of [`Format::F32`] and f16 in others.
pub struct Session {
    packed: Arc<Packed>,
    len: usize,
    pub(crate) keys: Vec<KvRows>,
    pub(crate) values: Vec<KvRows>,
    pub(crate) room: Room,
    /// For the other tokens of a prompt that walk side by side; made when they are needed.
    more: Vec<Room>,
    pub(crate) forced: Option<Forced>,
    last: Counts,
    sum: Counts,
    nonzeros: Nonzeros,
}

/// What the workers share of one token, and what each has for itself.
pub(crate) struct Room {
    pub qkv: SharedVec,
    pub attended: SharedVec,
    /// Output of attention's projection.
    pub mid: SharedVec,
    /// For each worker its part of the MLP's sum, `[workers, padded(hidden)]`.
    pub partial: SharedVec,
    pub logits: SharedVec,
    pub own: PerWorker<Own>,
}

/// A worker's own room.
pub(crate) struct Own {
    /// The residual stream: every worker adds up its own copy, which saves a barrier.
    pub x: Vec<f32>,
    pub input: Input,
    pub o_input: Input,
    /// The gate of this worker's neurons.
    pub gate: Vec<f32>,
    /// Their `up`, where that is computed for all of them.
    pub up: Vec<f32>,
    pub neurons: Vec<u32>,
    pub active: Vec<f32>,
    pub products: Vec<f32>,
    pub down_list: Vec<u32>,
    pub down_values: Vec<f32>,
    pub scaled: Vec<f32>,
    /// One head's query, key, value and output.
    pub heads: [Vec<f32>; 4],
    pub scores: Vec<f32>,
    pub counts: Counts,
    /// Of inputs that all workers list alike, the first worker's; of neurons, its own.
    pub nonzeros: Nonzeros,
}

impl Session {
    /// An empty sequence.
    ///
    /// # Errors
    /// No memory for keys and values.
    pub fn new(engine: &Engine) -> Result<Session> {
        let packed = engine.packed.clone();
        let format = if packed.format == Format::F32 { Format::F32 } else { Format::F16 };
        let kv = || {
            let rows = packed.layers.iter().map(|layer| {
                let heads = &layer.plan.heads;
                KvRows::new(format, heads.kv_heads, packed.context, heads.head_dim)
            });
            rows.collect::<Result<Vec<_>>>()
        };
        let (keys, values) = (kv()?, kv()?);
        let room = Room::new(&packed);
        let (more, last, sum, nonzeros) = Default::default();
        Ok(Session { packed, len: 0, keys, values, room, more, forced: None, last, sum, nonzeros })
    }

    /// Appends tokens; the logits `[vocab]` after the last of them. A longer prompt goes through
    /// the layers many tokens at a time, densely. The last token, and those of a short prompt, are decoded
    /// as [`Session::step`] does, a few side by side.
    ///
    /// # Errors
    /// No tokens; one outside the vocabulary; more than the context holds. Nothing is appended then.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.accepts(tokens)?;
        let Some((last, before)) = tokens.split_last() else { return Err(Error::EmptyPrompt) };
        self.begin();
        let mut before = before;
        if before.len() >= LEAST {
            let mut room = BatchRoom::new(&self.packed, before.len().min(MOST));
            while before.len() >= LEAST {
                let (now, rest) = before.split_at(before.len().min(MOST));
                self.pass_many(now, &mut room)?;
                before = rest;
            }
        }
        before.chunks(FEW).for_each(|tokens| self.pass(tokens, false));
        self.pass(&[*last], true);
        Ok(self.logits())
    }

    /// Appends the beginning of a prompt, and says how many tokens that was: with a long prompt as many
    /// as go through the layers at a time, so that a caller can do something else in between. Once all
    /// are appended, [`Session::logits`] are those after the last, with the bits that
    /// [`Session::prefill`] of the whole gives.
    ///
    /// # Errors
    /// As [`Session::prefill`] of the whole.
    pub fn prefill_piece(&mut self, prompt: &[u32]) -> Result<usize> {
        if prompt.len() <= MOST {
            return self.prefill(prompt).map(|_| prompt.len());
        }
        self.accepts(prompt)?;
        self.begin();
        self.pass_many(&prompt[..MOST], &mut BatchRoom::new(&self.packed, MOST))?;
        Ok(MOST)
    }

    /// Whether tokens can be appended.
    pub(crate) fn accepts(&self, tokens: &[u32]) -> Result<()> {
        let (vocab, context) = (self.packed.spec.vocab, self.packed.context);
        if let Some(&id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::TokenOutOfRange { id, vocab });
        }
        let len = self.len + tokens.len();
        if len > context { Err(Error::ContextFull { len, context }) } else { Ok(()) }
    }

    /// Appends one token; the logits `[vocab]` after it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, token: u32) -> Result<&[f32]> {
        self.prefill(&[token])
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many more tokens fit.
    pub fn left(&self) -> usize {
        self.packed.context - self.len
    }

    /// What the last call of [`Session::prefill`] or [`Session::step`] did.
    pub fn counts(&self) -> Counts {
        self.last
    }

    /// What was not zero of the last token, at each site: a share over all layers.
    pub fn densities(&self) -> SiteDensities {
        self.nonzeros.densities(&self.packed.spec)
    }

    /// What all calls together did.
    pub fn total_counts(&self) -> Counts {
        self.sum
    }

    /// The logits `[vocab]` after the last token of [`Session::prefill`] or [`Session::step`].
    pub fn logits(&self) -> &[f32] {
        // SAFETY: workers write only while the session is borrowed mutably.
        unsafe { &self.room.logits.read()[..self.packed.spec.vocab] }
    }

    /// Many tokens through the layers.
    fn pass_many(&mut self, tokens: &[u32], room: &mut BatchRoom) -> Result<()> {
        let packed = &*self.packed;
        let batch = Batch {
            packed,
            keys: &self.keys,
            values: &self.values,
            room,
            tokens,
            position: self.len,
        };
        // SAFETY: room and cache are borrowed mutably, and the pool gives each worker another index.
        packed.pool.run(|worker| unsafe { batch.run(worker) });
        let counts = room.take_counts()?;
        self.len += tokens.len();
        self.last += counts;
        self.sum += counts;
        Ok(())
    }

    /// A few tokens side by side through the layers, and through the head where logits are wanted.
    fn pass(&mut self, tokens: &[u32], logits: bool) {
        let packed = &*self.packed;
        while self.more.len() + 1 < tokens.len() {
            self.more.push(Room::new(packed));
        }
        let rooms = std::iter::once(&self.room).chain(&self.more);
        let lanes = rooms.zip(tokens).enumerate().map(|(n, (room, token))| Lane {
            room,
            position: self.len + n,
            ..self.lane(*token)
        });
        let lanes: Vec<Lane<'_>> = lanes.collect();
        let walk = Walk { packed, lanes: &lanes, one: lanes.len() > 1, logits };
        // SAFETY: rooms, keys and values are this session's, which is borrowed mutably, and the pool
        // gives each worker another index.
        packed.pool.run(|worker| unsafe { walk.run(worker) });
        self.len += tokens.len() - 1;
        for room in self.more.iter_mut().take(tokens.len() - 1) {
            let (counts, _) = room.take();
            self.last += counts;
            self.sum += counts;
        }
        self.finish();
    }

    /// What a token's walk needs of the sequence.
    pub(crate) fn lane(&self, token: u32) -> Lane<'_> {
        Lane {
            keys: &self.keys,
            values: &self.values,
            room: &self.room,
            forced: self.forced.as_ref(),
            token,
            position: self.len,
        }
    }

    /// Begins to count.
    pub(crate) fn begin(&mut self) {
        self.last = Counts::default();
    }

    /// Takes note of a token that has walked.
    pub(crate) fn finish(&mut self) {
        self.len += 1;
        let (counts, nonzeros) = self.room.take();
        self.last += counts;
        self.sum += counts;
        self.nonzeros = nonzeros;
    }
}

impl Room {
    /// What was done since the last call.
    fn take(&mut self) -> (Counts, Nonzeros) {
        let (mut counts, mut nonzeros) = (Counts::default(), Nonzeros::default());
        for own in self.own.iter_mut() {
            counts += std::mem::take(&mut own.counts);
            nonzeros += std::mem::take(&mut own.nonzeros);
        }
        (counts, nonzeros)
    }

    fn new(packed: &Packed) -> Room {
        let hidden = packed.spec.hidden;
        let most = |width: fn(&relufy_model::layer::LayerPlan) -> usize| {
            packed.layers.iter().map(|layer| width(&layer.plan)).max().unwrap_or(0)
        };
        let qkv = most(|plan| plan.q_width + 2 * plan.kv_width);
        let (q_width, ffn) = (most(|plan| plan.q_width), most(|plan| plan.ffn));
        let head_dim = padded(most(|plan| plan.heads.head_dim));
        let up = packed.layers.iter().filter_map(|layer| layer.up.as_ref());
        let up = up.map(|up| up.outputs).max().unwrap_or(0);
        let workers = packed.pool.workers();
        let empty = |width| Vec::with_capacity(width);
        Room {
            qkv: SharedVec::new(padded(qkv)),
            attended: SharedVec::new(padded(q_width)),
            mid: SharedVec::new(padded(hidden)),
            partial: SharedVec::new(padded(hidden) * workers),
            logits: SharedVec::new(padded(packed.spec.vocab)),
            own: PerWorker::new(workers, || Own {
                x: vec![0.0; hidden],
                input: Input::new(hidden),
                o_input: Input::new(q_width),
                gate: vec![0.0; padded(ffn)],
                up: vec![0.0; padded(up)],
                neurons: Vec::with_capacity(padded(ffn)),
                active: empty(padded(ffn)),
                products: empty(padded(ffn)),
                down_list: Vec::with_capacity(padded(ffn)),
                down_values: empty(padded(ffn)),
                scaled: empty(padded(ffn)),
                heads: std::array::from_fn(|_| vec![0.0; head_dim]),
                scores: vec![0.0; packed.context],
                counts: Counts::default(),
                nonzeros: Nonzeros::default(),
            }),
        }
    }
}
