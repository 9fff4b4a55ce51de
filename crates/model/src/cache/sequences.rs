//! Sequences side by side that grow at their ends, each in rows of its own.

use candle_core::Tensor;
use relufy_ops::attention::Segment;

use super::KvRows;
use crate::{Decoder, Error, Result, Tokens};

/// The keys and values of several sequences.
pub struct KvCache {
    rows: KvRows,
    capacity: usize,
    lengths: Vec<usize>,
}

impl KvCache {
    /// Room for `sequences` of at most `capacity` tokens each.
    ///
    /// # Errors
    /// More tokens than the model has positions, or than the device has room for.
    pub fn new(decoder: &Decoder, sequences: usize, capacity: usize) -> Result<KvCache> {
        let spec = decoder.spec();
        if capacity > spec.max_positions {
            return Err(Error::SequenceTooLong { len: capacity, max: spec.max_positions });
        }
        let rows = KvRows::new(decoder, sequences * capacity)?;
        Ok(KvCache { rows, capacity, lengths: vec![0; sequences] })
    }

    /// How many tokens a sequence has.
    pub fn len(&self, sequence: usize) -> usize {
        self.lengths.get(sequence).copied().unwrap_or(0)
    }

    /// How many more tokens fit a sequence.
    pub fn left(&self, sequence: usize) -> usize {
        self.capacity - self.len(sequence)
    }

    /// Whether no sequence has tokens.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|len| *len == 0)
    }

    /// Forgets what follows the first `len` tokens of a sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        if let Some(current) = self.lengths.get_mut(sequence) {
            *current = len.min(*current);
        }
    }

    /// A layer's keys, normalised and turned to their positions, and its values: `[sequences *
    /// capacity, kv_width]` each, a sequence's rows after those of the one before. `None` where there
    /// is no such layer.
    pub fn layer(&self, n: usize) -> Option<(&Tensor, &Tensor)> {
        self.rows.layer(n)
    }

    /// Appends tokens to sequences, each named at most once: what [`Decoder::hidden_cached`]
    /// takes next.
    ///
    /// # Errors
    /// A sequence that does not exist, is named twice, or is full.
    pub fn extend(&mut self, new: &[(usize, &[u32])]) -> Result<Tokens> {
        let mut tokens = Tokens::default();
        let mut lengths = self.lengths.clone();
        let mut pending = Vec::new();
        for (n, (sequence, ids)) in new.iter().enumerate() {
            let known = *sequence < lengths.len();
            if !known || new[..n].iter().any(|(earlier, _)| earlier == sequence) {
                let why = if known { "is named twice" } else { "does not exist" };
                return Err(Error::Invalid(format!("sequence {sequence} of the cache {why}")));
            }
            let before = lengths[*sequence];
            let after = before + ids.len();
            if after > self.capacity {
                return Err(Error::SequenceTooLong { len: after, max: self.capacity });
            }
            let first_row = sequence * self.capacity;
            let queries = (tokens.ids.len(), ids.len());
            tokens.segments.push(Segment::continued(queries, (first_row, after)));
            tokens.ids.extend(*ids);
            tokens.positions.extend(before as u32..after as u32);
            pending.extend(first_row + before..first_row + after);
            lengths[*sequence] = after;
        }
        self.lengths = lengths;
        self.rows.announce(pending);
        Ok(tokens)
    }
}

impl AsMut<KvRows> for KvCache {
    fn as_mut(&mut self) -> &mut KvRows {
        &mut self.rows
    }
}
