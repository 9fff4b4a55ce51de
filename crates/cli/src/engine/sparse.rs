//! The engines that read only the rows of inputs and neurons that are not zero.

use relufy_sparse::{Sequence, Session, Sessions};

use super::Engine;

/// One sequence, wherever it is decoded.
pub struct Alone {
    sequence: Box<dyn Sequence>,
    logits: Vec<f32>,
}

impl Alone {
    pub fn new(sequence: Box<dyn Sequence>) -> Alone {
        Alone { sequence, logits: Vec::new() }
    }
}

impl Engine for Alone {
    fn places(&self) -> usize {
        1
    }

    fn clear(&mut self, _place: usize, _len: usize) -> anyhow::Result<()> {
        self.sequence.truncate(0);
        Ok(())
    }

    fn left(&self, _place: usize) -> usize {
        self.sequence.left()
    }

    fn prefill(&mut self, _place: usize, prompt: &[u32]) -> anyhow::Result<usize> {
        let logits = self.sequence.prefill(prompt)?;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        Ok(prompt.len())
    }

    fn step(&mut self, tokens: &[(usize, u32)]) -> anyhow::Result<()> {
        tokens.iter().try_for_each(|(place, token)| self.prefill(*place, &[*token]).map(drop))
    }

    fn logits(&self, _place: usize) -> &[f32] {
        &self.logits
    }
}

/// Sequences side by side on the CPU: a weight that several need is read once.
impl Engine for Sessions {
    fn places(&self) -> usize {
        self.batch()
    }

    fn clear(&mut self, place: usize, _len: usize) -> anyhow::Result<()> {
        Ok(Sessions::clear(self, place)?)
    }

    fn left(&self, place: usize) -> usize {
        self.get(place).map_or(0, Session::left)
    }

    fn prefill(&mut self, place: usize, prompt: &[u32]) -> anyhow::Result<usize> {
        Ok(self.prefill_piece(place, prompt)?)
    }

    fn step(&mut self, tokens: &[(usize, u32)]) -> anyhow::Result<()> {
        Ok(self.step_some(tokens)?)
    }

    fn logits(&self, place: usize) -> &[f32] {
        self.get(place).map_or(&[], Session::logits)
    }
}
