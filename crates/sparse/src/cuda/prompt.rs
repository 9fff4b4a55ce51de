//! Prompts through the decoder that an engine was made of: many tokens at a time, densely, because
//! with many tokens arithmetic is what takes time. Its keys and values move into the session.

use relufy_model::{Error, KvCache, NoTap};

use super::session::GpuSession;
use crate::Result;

/// Fewer tokens than this go one by one.
const LEAST: usize = 8;

/// The most tokens of one pass.
const MOST: usize = 2048;

impl GpuSession {
    /// Takes the first tokens of a prompt, all but the last, where the decoder can: how many.
    pub(super) fn take_prompt(&mut self, row: usize, prompt: &[u32]) -> Result<usize> {
        let before = &prompt[..prompt.len() - 1];
        let Some(decoder) = &self.packed.decoder else { return Ok(0) };
        // What is in the session's cache the decoder cannot attend to.
        if self.lens[row] > 0 || before.len() < LEAST {
            return Ok(0);
        }
        let mut cache = KvCache::new(decoder, 1, before.len())?;
        for tokens in before.chunks(MOST) {
            let tokens = cache.extend(&[(0, tokens)])?;
            decoder.hidden_cached(&tokens, &mut cache, &mut NoTap)?;
        }
        for (n, layer) in self.buffers.layers.iter().enumerate() {
            let missing = || Error::Invalid(format!("the cache has no layer {n}"));
            let (keys, values) = cache.layer(n).ok_or_else(missing)?;
            layer.cache.store(row, 0, keys, values)?;
        }
        self.lens[row] = before.len();
        Ok(before.len())
    }
}
