//! What makes the tokens. The server knows no more of a model than this.

use relufy_model::{Decoder, generate};

/// A model that continues prompts, one after the other.
pub trait Engine {
    /// Continues `prompt` by at most `max_new` tokens. `sample` picks a token from the logits
    /// `[vocab]`; `on_token` sees each token as it comes and ends the generation by returning
    /// `false`. A token of `stop` ends it too and is not shown.
    ///
    /// # Errors
    /// A prompt that the model cannot take, what `sample` returns, and a device that fails.
    fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        stop: &[u32],
        sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> anyhow::Result<()>;
}

/// The decoder that everything else in the program uses: every weight is read for every token.
impl Engine for Decoder {
    fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        stop: &[u32],
        sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> anyhow::Result<()> {
        generate(self, prompt, max_new, stop, sample, on_token).map(drop)
    }
}
