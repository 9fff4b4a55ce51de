//! A flat run of tokens, and who may attend to whom.

use relufy_ops::attention::Segment;

use crate::{Error, Result};

/// Tokens for one pass, flattened: `ids[i]` sits at `positions[i]`, and each segment
/// attends to itself only (a row of a batch, a document of a packed row) and to what a cache
/// holds of its sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Their positions, from 0 in each segment unless a cache goes before.
    pub positions: Vec<u32>,
    /// Which queries see which keys.
    pub segments: Vec<Segment>,
}

impl Tokens {
    /// A batch of rows of `len` tokens each; a shorter rest is a row of its own.
    pub fn rows(ids: Vec<u32>, len: usize) -> Tokens {
        let lengths = ids.chunks(len.max(1)).map(<[u32]>::len).collect::<Vec<_>>();
        Tokens::packed(ids, lengths)
    }

    /// Segments of these lengths, one after the other.
    pub fn packed(ids: Vec<u32>, lengths: impl IntoIterator<Item = usize>) -> Tokens {
        let mut tokens = Tokens { ids, ..Tokens::default() };
        let mut start = 0;
        for len in lengths {
            tokens.positions.extend(0..len as u32);
            tokens.segments.push(Segment::document(start, len));
            start += len;
        }
        tokens
    }

    /// How many tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Refuses what the decoder cannot take.
    pub(crate) fn check(&self, vocab: usize, max_positions: usize) -> Result<()> {
        if let Some(id) = self.ids.iter().copied().find(|id| *id as usize >= vocab) {
            return Err(Error::TokenOutOfRange { id, vocab });
        }
        if self.positions.len() != self.ids.len() {
            let (positions, ids) = (self.positions.len(), self.ids.len());
            return Err(Error::Invalid(format!("{positions} positions for {ids} tokens")));
        }
        match self.positions.iter().max() {
            Some(last) if *last as usize >= max_positions => {
                Err(Error::SequenceTooLong { len: *last as usize + 1, max: max_positions })
            }
            _ => Ok(()),
        }
    }
}
