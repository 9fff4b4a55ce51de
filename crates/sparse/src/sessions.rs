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
        for (session, token) in self.each.iter().zip(tokens) {
            session.accepts(&[*token])?;
        }
        let each = self.each.iter().zip(tokens);
        let lanes: Vec<_> = each.map(|(session, token)| session.lane(*token)).collect();
        let walk = Walk { packed: &self.packed, lanes: &lanes, logits: true };
        // SAFETY: the rooms are those of our sessions, which are borrowed mutably, and the pool gives each
        // worker another index.
        self.packed.pool.run(|worker| unsafe { walk.run(worker) });
        for session in &mut self.each {
            session.begin();
            session.finish();
        }
        Ok(())
    }

    /// The logits `[vocab]` after the last token of each sequence.
    pub fn logits(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.each.iter().map(Session::logits)
    }

    /// Forgets all but the first `len` tokens of each sequence.
    pub fn truncate(&mut self, len: usize) {
        self.each.iter_mut().for_each(|session| session.truncate(len));
    }

    /// How many sequences there are.
    pub fn batch(&self) -> usize {
        self.each.len()
    }

    /// How many more tokens fit every sequence.
    pub fn left(&self) -> usize {
        self.each.iter().map(Session::left).min().unwrap_or(0)
    }

    /// What the last call of [`Sessions::step`] did for all sequences; bytes that several need count once.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        self.each.iter().for_each(|session| sum += session.counts());
        sum
    }

    /// [`Session::densities`], the mean of all sequences.
    pub fn densities(&self) -> SiteDensities {
        let all: Vec<SiteDensities> = self.each.iter().map(Session::densities).collect();
        let mean =
            |site: fn(&SiteDensities) -> f64| all.iter().map(site).sum::<f64>() / all.len() as f64;
        SiteDensities {
            qkv: mean(|each| each.qkv),
            o: mean(|each| each.o),
            up: mean(|each| each.up),
            down: mean(|each| each.down),
        }
    }

    fn expect(&self, found: usize) -> Result<()> {
        let expected = self.each.len();
        if found == expected { Ok(()) } else { Err(Error::Sequences { found, expected }) }
    }
}
