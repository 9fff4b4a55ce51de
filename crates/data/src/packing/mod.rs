//! Documents into sequences of one length.
//!
//! The documents of a split follow one another as one stream of ids. Sequence `i` reads
//! the ids `[i * T, (i + 1) * T)` of it and predicts each one's successor, so that every id
//! of the stream is a target once an epoch (the first, with nothing before it, is only
//! read). The last sequence is filled up with padding that counts for nothing.

mod batch;
mod order;
mod source;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use batch::{Batch, IGNORE};
use order::{Permutations, Schedule};
pub(crate) use source::{PackedSource, split};

use crate::{Error, Result};

/// How documents become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackingConfig {
    /// Positions of a sequence.
    pub sequence_length: usize,
    /// Attention stays inside documents: each piece of a document is a segment of its own
    /// with positions from 0, and no document's end predicts the next one's beginning.
    #[serde(default = "yes")]
    pub document_boundaries: bool,
}

fn yes() -> bool {
    true
}

/// Sources between which the order does not distinguish.
#[derive(Debug)]
struct Pool {
    /// Each with the number of sequences before it.
    sources: Vec<(u64, PackedSource)>,
    sequences: u64,
    permutations: Permutations,
}

/// The sequences of a split.
#[derive(Debug)]
pub struct Packed {
    pools: Vec<Pool>,
    schedule: Schedule,
    config: PackingConfig,
    pad: u32,
    tokens: u64,
}

impl Packed {
    /// `weights` are empty, or one for each source.
    pub(crate) fn new(
        what: &str,
        sources: Vec<PackedSource>,
        weights: &[f64],
        config: PackingConfig,
        seed: u64,
        pad: u32,
    ) -> Result<Self> {
        let length = config.sequence_length;
        if length == 0 {
            return Err(Error::config("sequence_length", "must be at least 1"));
        }
        let groups: Vec<Vec<PackedSource>> = if weights.is_empty() {
            vec![sources]
        } else {
            sources.into_iter().map(|source| vec![source]).collect()
        };
        let mut pools = Vec::with_capacity(groups.len());
        let mut tokens = 0;
        for (number, group) in groups.into_iter().enumerate() {
            let mut sequences = 0;
            let mut sources = Vec::with_capacity(group.len());
            for source in group {
                tokens += source.tokens();
                let first = sequences;
                sequences += source.sequences(length);
                sources.push((first, source));
            }
            if sequences == 0 || u32::try_from(sequences).is_err() {
                let why = format!("{what} gives {sequences} sequences");
                return Err(Error::config("sequence_length", why));
            }
            let permutations = Permutations::new(seed, number as u64, sequences as u32);
            pools.push(Pool { sources, sequences, permutations });
        }
        let schedule = Schedule::new(seed, weights);
        Ok(Packed { pools, schedule, config, pad, tokens })
    }

    /// Sequences of an epoch, in which each id of the split stands once. With weights,
    /// sources come to their ends at different times; the number is still their sum.
    pub fn sequences(&self) -> u64 {
        self.pools.iter().map(|pool| pool.sequences).sum()
    }

    /// Ids of the split.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Positions of a sequence.
    pub fn sequence_length(&self) -> usize {
        self.config.sequence_length
    }

    /// Sequences `first..first + rows` of an endless shuffled stream, which goes through
    /// every sequence of a source before it takes one again, each time in another order. A
    /// pure function of the seed and its arguments: to resume, go on with as many sequences
    /// as were taken.
    ///
    /// # Errors
    /// Only if `first + rows` is past what a `u64` holds.
    pub fn batch(&self, first: u64, rows: usize) -> Result<Batch> {
        let past_end = || Error::config("first", "is past the last sequence that can be named");
        let end = first.checked_add(rows as u64).ok_or_else(past_end)?;
        let mut batch = self.empty();
        for index in first..end {
            let (pool, nth) = self.schedule.at(index);
            // The schedule knows as many pools as there are.
            if let Some(pool) = self.pools.get(pool) {
                let epoch = nth / pool.sequences;
                let place = pool.permutations.at(epoch, (nth % pool.sequences) as u32);
                self.push(pool, u64::from(place), &mut batch);
            }
        }
        Ok(batch)
    }

    /// Sequences `first..first + rows` in the order of the text; fewer at the end, none past
    /// it.
    ///
    /// # Errors
    /// None today; in the signature so that both ways of asking read alike.
    pub fn batch_in_order(&self, first: u64, rows: usize) -> Result<Batch> {
        let mut batch = self.empty();
        let mut before = 0;
        let end = first.saturating_add(rows as u64);
        for pool in &self.pools {
            let pool_end = before + pool.sequences;
            for index in first.max(before)..end.min(pool_end) {
                self.push(pool, index - before, &mut batch);
            }
            before = pool_end;
        }
        Ok(batch)
    }

    fn empty(&self) -> Batch {
        Batch { seq_len: self.config.sequence_length, ..Batch::default() }
    }

    /// Adds sequence `place` of a pool as a row.
    fn push(&self, pool: &Pool, place: u64, batch: &mut Batch) {
        let nth = pool.sources.partition_point(|(first, _)| *first <= place);
        if let Some((first, source)) = nth.checked_sub(1).and_then(|nth| pool.sources.get(nth)) {
            source.push_row(place - first, &self.config, self.pad, batch);
        }
    }
}

/// A source's cache, shared by its splits.
pub(crate) type Cache = Arc<crate::cache::TokenCache>;
