//! What a training step eats.

/// The target of a position that counts for nothing.
pub const IGNORE: i64 = -100;

/// Sequences of one length, flattened row by row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[rows * seq_len]`.
    pub ids: Vec<u32>,
    /// What each position predicts, `[rows * seq_len]`: the id that follows it (so these are
    /// shifted already), or [`IGNORE`] for masked prompts, document ends and padding.
    pub targets: Vec<i64>,
    /// Positions, `[rows * seq_len]`; they begin at 0 in each segment.
    pub positions: Vec<u32>,
    /// `(start, len)` in the flat arrays: attention stays inside a segment. In order,
    /// without gaps, none across rows.
    pub segments: Vec<(usize, usize)>,
    /// Sequences.
    pub rows: usize,
    /// Positions of a sequence.
    pub seq_len: usize,
}

impl Batch {
    /// Positions that count.
    pub fn targets_counted(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// Adds a segment of so many positions, which start at 0.
    pub(super) fn push_segment(&mut self, len: usize) {
        if len > 0 {
            self.segments.push((self.positions.len(), len));
            self.positions.extend(0..len as u32);
        }
    }
}
