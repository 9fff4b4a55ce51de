//! Without gradients: how likely the targets are, and the logits themselves.

use candle_core::Tensor;
use rayon::prelude::*;

use super::{Head, OP, Rows, Source, active_rows, chunk_rows, rows};
use crate::buffer::{dims2, from_vec};
use crate::error::Result;

/// What a model thinks of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Whether greedy decoding would have chosen it: it is the first of the largest logits.
    pub greedy: bool,
}

/// Scores of the targets, one a row of `h` `[n, width]`. A row whose target is [`super::IGNORE`]
/// gets the neutral score: log-probability 0, greedy.
///
/// # Errors
/// As [`super::cross_entropy`].
pub fn score_tokens(h: &Tensor, head: &Head<'_>, targets: &[i64]) -> Result<Vec<TokenScore>> {
    let active = active_rows(h, head, targets)?;
    let source = Source::new(h, head)?;
    let vocab = source.vocab;
    let mut scores = vec![TokenScore { logprob: 0.0, greedy: true }; targets.len()];
    let chunk_rows = chunk_rows(vocab).min(active.len().max(1));
    let mut logits = vec![0.0; chunk_rows * vocab];
    for active in active.chunks(chunk_rows) {
        let logits = &mut logits[..active.len() * vocab];
        let h = Rows::gather(&source.hidden, source.width, active);
        source.multiply(&h, active.len(), logits)?;
        let found: Vec<(f32, bool)> = logits
            .par_chunks_mut(vocab)
            .zip(active)
            .map(|(logits, &row)| rows::score(logits, source.adjust(), targets[row] as usize))
            .collect();
        for (&row, (logprob, greedy)) in active.iter().zip(found) {
            scores[row] = TokenScore { logprob, greedy };
        }
    }
    Ok(scores)
}

/// The logits of `h` `[n, width]`, `[n, vocab]`: all of them, so for few rows.
///
/// # Errors
/// Shapes that do not fit, or no kernel for the device or dtype.
pub fn logits(h: &Tensor, head: &Head<'_>) -> Result<Tensor> {
    let (n, _) = dims2(h, OP, "h")?;
    let source = Source::new(h, head)?;
    let mut logits = vec![0.0; n * source.vocab];
    source.multiply(&Rows::Run(0, &source.hidden), n, &mut logits)?;
    let by = source.adjust();
    logits.par_chunks_mut(source.vocab.max(1)).for_each(|row| rows::adjust_row(row, by));
    from_vec(logits, (n, source.vocab), h.device())
}
