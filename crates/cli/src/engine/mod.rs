//! What makes the tokens: the decoder, or the engine that skips the zeros. `generate` and `serve`
//! know no more of a model than this.

mod args;
mod dense;
mod sparse;

pub use args::{EngineArgs, has_zeros};

/// A model that continues texts, one at each of its places. Those of several places take a token
/// each at a time.
pub trait Engine {
    /// How many texts it continues side by side.
    fn places(&self) -> usize;

    /// Forgets the text at a place; the next will have at most `len` tokens.
    ///
    /// # Errors
    /// No memory for it.
    fn clear(&mut self, place: usize, len: usize) -> anyhow::Result<()>;

    /// How many more tokens fit a place's text.
    fn left(&self, place: usize) -> usize;

    /// Appends the beginning of a prompt to a place's text, and says how many tokens that was: of a
    /// long prompt perhaps not all, so that the others can go on in between.
    ///
    /// # Errors
    /// A prompt that the model cannot take; a device that fails.
    fn prefill(&mut self, place: usize, prompt: &[u32]) -> anyhow::Result<usize>;

    /// Appends a token to the texts at some places, in ascending order.
    ///
    /// # Errors
    /// A text that is as long as it may be; a device that fails.
    fn step(&mut self, tokens: &[(usize, u32)]) -> anyhow::Result<()>;

    /// The logits `[vocab]` after the last token at a place.
    fn logits(&self, place: usize) -> &[f32];
}

/// Continues `prompt` by at most `max_new` tokens; returns how many it made. `sample` picks a
/// token from the logits `[vocab]`; `on_token` sees each token as it comes and ends the
/// generation by returning `false`. A token of `stop` ends it too and is not shown.
///
/// # Errors
/// A prompt that the model cannot take, what `sample` returns, and a device that fails.
pub fn generate(
    engine: &mut dyn Engine,
    prompt: &[u32],
    max_new: usize,
    stop: &[u32],
    sample: &mut dyn FnMut(&[f32]) -> anyhow::Result<u32>,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> anyhow::Result<usize> {
    engine.clear(0, prompt.len().saturating_add(max_new))?;
    let room = max_new.min(engine.left(0).saturating_sub(prompt.len()));
    let mut taken = engine.prefill(0, prompt)?;
    while taken < prompt.len() {
        taken += engine.prefill(0, &prompt[taken..])?;
    }
    let mut made = 0;
    while made < room {
        let token = sample(engine.logits(0))?;
        if stop.contains(&token) {
            break;
        }
        made += 1;
        if !on_token(token) || made == room {
            break;
        }
        engine.step(&[(0, token)])?;
    }
    Ok(made)
}
