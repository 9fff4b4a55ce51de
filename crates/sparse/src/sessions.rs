//! Several sequences that are decoded side by side.

use std::sync::Arc;

use relufy_spec::flops::SiteDensities;

use crate::counts::Counts;
use crate::engine::{Engine, Packed};
use crate::session::Session;
use crate::walk::Walk;
use crate::{Error, Result};

/// Sequences that take one token each at a time. A weight that any of them needs is read once, and each
/// computes with its own non-zeros only: in f32, f16 and bf16 to the bit what a [`Session`] gives.
pub struct Sessions {
    packed: Arc<Packed>,
    pub(crate) each: Vec<Session>,
}

impl Sessions {
    /// So many empty sequences.
    ///
    /// # Errors
    /// No memory for keys and values.
    pub fn new(engine: &Engine, batch: usize) -> Result<Sessions> {
        let each = (0..batch).map(|_| Session::new(engine)).collect::<Result<_>>()?;
        Ok(Sessions { packed: engine.packed.clone(), each })
    }

    /// Appends tokens to each sequence, which may be as many as it likes: one sequence after the other.
    ///
    /// # Errors
    /// Prompts for another number of sequences; as [`Session::prefill`], after which the sequences before
    /// have their tokens.
    pub fn prefill(&mut self, prompts: &[&[u32]]) -> Result<()> {
        self.expect(prompts.len())?;
        for (session, prompt) in self.each.iter_mut().zip(prompts) {
            session.prefill(prompt)?;
        }
        Ok(())
    }

    /// Appends one token to each sequence.
    ///
    /// # Errors
    /// Tokens for another number of sequences; as [`Session::step`]. Nothing is appended then.
    pub fn step(&mut self, tokens: &[u32]) -> Result<()> {
        self.expect(tokens.len())?;
        let each: Vec<(usize, u32)> = tokens.iter().copied().enumerate().collect();
        self.step_some(&each)
    }

    /// Appends one token to each of some sequences, named by their places in ascending order; the others
    /// stay as they are.
    ///
    /// # Errors
    /// Places that are not there, or not in order; as [`Session::step`]. Nothing is appended then.
    pub fn step_some(&mut self, tokens: &[(usize, u32)]) -> Result<()> {
        let mut free = 0;
        for (place, token) in tokens {
            let session = self.each.get(*place).filter(|_| *place >= free);
            session.ok_or_else(|| self.no_place(*place))?.accepts(&[*token])?;
            free = place + 1;
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let lanes: Vec<_> =
            tokens.iter().map(|(place, token)| self.each[*place].lane(*token)).collect();
        let walk = Walk { packed: &self.packed, lanes: &lanes, one: false, logits: true };
        // SAFETY: the rooms are those of our sessions, which are borrowed mutably, each place is named
        // once, and the pool gives each worker another index.
        self.packed.pool.run(|worker| unsafe { walk.run(worker) });
        for session in &mut self.each {
            session.begin();
        }
        for (place, _) in tokens {
            self.each[*place].finish();
        }
        Ok(())
    }

    /// [`Session::prefill_piece`] of one sequence.
    ///
    /// # Errors
    /// A place that is not there; as [`Session::prefill_piece`].
    pub fn prefill_piece(&mut self, place: usize, prompt: &[u32]) -> Result<usize> {
        let missing = self.no_place(place);
        self.each.get_mut(place).ok_or(missing)?.prefill_piece(prompt)
    }

    /// The sequence at a place.
    pub fn get(&self, place: usize) -> Option<&Session> {
        self.each.get(place)
    }

    /// The logits `[vocab]` after the last token of each sequence.
    pub fn logits(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.each.iter().map(Session::logits)
    }

    /// Forgets all but the first `len` tokens of each sequence.
    pub fn truncate(&mut self, len: usize) {
        self.each.iter_mut().for_each(|session| session.truncate(len));
    }

    /// Forgets all tokens of one sequence.
    ///
    /// # Errors
    /// A place that is not there.
    pub fn clear(&mut self, place: usize) -> Result<()> {
        let missing = self.no_place(place);
        self.each.get_mut(place).ok_or(missing)?.truncate(0);
        Ok(())
    }

    /// How many sequences there are.
    pub fn batch(&self) -> usize {
        self.each.len()
    }

    /// How many more tokens fit every sequence.
    pub fn left(&self) -> usize {
        self.each.iter().map(Session::left).min().unwrap_or(0)
    }

    /// What the last call of [`Sessions::step`] or [`Sessions::step_some`] did for all sequences; bytes that several need count once.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        self.each.iter().for_each(|session| sum += session.counts());
        sum
    }

    /// [`Session::densities`], the mean of all sequences.
    pub fn densities(&self) -> SiteDensities {
        let all: Vec<SiteDensities> = self.each.iter().map(Session::densities).collect();
        SiteDensities::mean(&all)
    }

    fn no_place(&self, place: usize) -> Error {
        Error::Place { place, sequences: self.each.len() }
    }

    fn expect(&self, found: usize) -> Result<()> {
        let expected = self.each.len();
        if found == expected { Ok(()) } else { Err(Error::Sequences { found, expected }) }
    }
}
