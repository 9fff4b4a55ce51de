//! The decoder that everything else in the program uses: every weight is read for every token.

use relufy_model::{Decoder, KvCache, next_logits};

use super::Engine;

/// A decoder with room for one text.
pub struct Dense {
    decoder: Decoder,
    cache: KvCache,
    logits: Vec<f32>,
}

impl Dense {
    /// # Errors
    /// A device that fails.
    pub fn new(decoder: Decoder) -> anyhow::Result<Dense> {
        let cache = KvCache::new(&decoder, 1, 1)?;
        Ok(Dense { decoder, cache, logits: Vec::new() })
    }
}

impl Engine for Dense {
    fn places(&self) -> usize {
        1
    }

    /// Keys and values take as much memory as the text may have tokens, whether they come or not.
    fn clear(&mut self, _place: usize, len: usize) -> anyhow::Result<()> {
        // The memory of the last text first.
        self.cache = KvCache::new(&self.decoder, 1, 1)?;
        let len = len.min(self.decoder.spec().max_positions);
        self.cache = KvCache::new(&self.decoder, 1, len.max(1))?;
        Ok(())
    }

    fn left(&self, _place: usize) -> usize {
        self.cache.left(0)
    }

    fn prefill(&mut self, _place: usize, prompt: &[u32]) -> anyhow::Result<usize> {
        self.logits = next_logits(&self.decoder, &mut self.cache, prompt)?;
        Ok(prompt.len())
    }

    fn step(&mut self, tokens: &[(usize, u32)]) -> anyhow::Result<()> {
        tokens.iter().try_for_each(|(place, token)| self.prefill(*place, &[*token]).map(drop))
    }

    fn logits(&self, _place: usize) -> &[f32] {
        &self.logits
    }
}
