//! A sequence that is being decoded, wherever its decoder lies.

use relufy_model::Decoder;

use crate::{Counts, Engine, Options, Result, Session};

/// A sequence that is being decoded: tokens go in, the logits after the last come out.
pub trait Sequence {
    /// Appends tokens; the logits `[vocab]` after the last of them.
    ///
    /// # Errors
    /// No tokens; one outside the vocabulary; more than the context holds. Nothing is appended then.
    /// A device that fails.
    fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]>;

    /// Appends one token; the logits `[vocab]` after it.
    ///
    /// # Errors
    /// As [`Sequence::prefill`].
    fn step(&mut self, token: u32) -> Result<&[f32]> {
        self.prefill(&[token])
    }

    /// Forgets all but the first `len` tokens.
    fn truncate(&mut self, len: usize);

    /// How many more tokens fit.
    fn left(&self) -> usize;

    /// What the last call of [`Sequence::step`] did.
    ///
    /// # Errors
    /// A device that fails.
    fn counts(&self) -> Result<Counts>;
}

impl Sequence for Session {
    fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        Session::prefill(self, tokens)
    }

    fn truncate(&mut self, len: usize) {
        Session::truncate(self, len);
    }

    fn left(&self) -> usize {
        Session::left(self)
    }

    fn counts(&self) -> Result<Counts> {
        Ok(Session::counts(self))
    }
}

/// An empty sequence of a decoder, on the device where the decoder lies. A GPU may read all weights
/// instead of skipping some, where `fastest` and that is faster, as in a small model.
///
/// # Errors
/// As [`Engine::new`] and [`Session::new`], or `GpuEngine::fastest` and `GpuSession::new`.
pub fn sequence(decoder: Decoder, options: &Options, fastest: bool) -> Result<Box<dyn Sequence>> {
    #[cfg(not(feature = "cuda"))]
    let _ = fastest;
    #[cfg(feature = "cuda")]
    if decoder.device().is_cuda() {
        let engine = match fastest {
            true => crate::GpuEngine::fastest(decoder, options, 1)?,
            false => crate::GpuEngine::new(decoder, options)?,
        };
        return Ok(Box::new(crate::GpuSession::new(&engine, 1)?));
    }
    Ok(Box::new(Session::new(&Engine::new(&decoder, options)?)?))
}
