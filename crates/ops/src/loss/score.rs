//! Without gradients: how likely the targets are, and the logits themselves.

use candle_core::Tensor;
use rayon::prelude::*;

use super::rows::{self, Summary};
use super::{Head, OP, Rows, Source, check_head, chunk_rows};
use crate::buffer::{dims2, from_vec};
use crate::error::{Error, Result};

/// What a model thinks of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Whether greedy decoding would have chosen it: it is the first of the largest logits.
    pub greedy: bool,
}

/// Scores of `wanted`, pairs of a row of `h` `[n, width]` and a token, in their order.
///
/// Only rows that are named are multiplied by the head, and each once, however many tokens are
/// wanted of it.
///
/// # Errors
/// A row that `h` does not have, a token outside the vocabulary ([`Error::TokenOutOfRange`], with
/// its index in `wanted`), shapes that do not fit, or no kernel for the device or dtype.
pub fn score_tokens(h: &Tensor, head: &Head<'_>, wanted: &[(u32, u32)]) -> Result<Vec<TokenScore>> {
    let (n, _) = dims2(h, OP, "h")?;
    let (vocab, _) = check_head(h, head)?;
    for (index, &(row, token)) in wanted.iter().enumerate() {
        if row as usize >= n {
            let range = row as usize..row as usize + 1;
            return Err(Error::Range { op: OP, what: "rows", range, len: n });
        }
        if token as usize >= vocab {
            return Err(Error::TokenOutOfRange { op: OP, index, id: token.into(), rows: vocab });
        }
    }
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() {
        return crate::cuda::loss::score_tokens(h, head, wanted);
    }
    let source = Source::new(h, head)?;
    // What is wanted of one row lies together; the sort is stable, so that rows which come in
    // order are not moved.
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&index| wanted[index].0);
    let by_row: Vec<&[usize]> = order.chunk_by(|&a, &b| wanted[a].0 == wanted[b].0).collect();
    let row_of = |group: &[usize]| group.first().map_or(0, |&index| wanted[index].0 as usize);

    let mut scores = vec![TokenScore { logprob: 0.0, greedy: false }; wanted.len()];
    over_rows(
        &source,
        &by_row,
        |group| row_of(group),
        |logits, group| {
            let Summary { max, lse } = rows::summarise(logits, source.adjust());
            // Looked for only if a wanted token has the largest logit.
            let mut first = None;
            let score = |&index: &usize| {
                let token = wanted[index].1 as usize;
                let at = logits[token];
                let greedy = at == max
                    && *first.get_or_insert_with(|| rows::find(logits, max)) == Some(token);
                (index, TokenScore { logprob: at - lse, greedy })
            };
            group.iter().map(score).collect::<Vec<_>>()
        },
    )?
    .into_iter()
    .flatten()
    .for_each(|(index, score)| scores[index] = score);
    Ok(scores)
}

/// What greedy decoding chooses after each row of `h` `[n, width]`: the first of the largest
/// logits; `None` where a logit is NaN.
///
/// # Errors
/// Shapes that do not fit, or no kernel for the device or dtype.
pub fn greedy_tokens(h: &Tensor, head: &Head<'_>) -> Result<Vec<Option<u32>>> {
    let (n, _) = dims2(h, OP, "h")?;
    check_head(h, head)?;
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() {
        return crate::cuda::loss::greedy_tokens(h, head);
    }
    let source = Source::new(h, head)?;
    let all: Vec<usize> = (0..n).collect();
    over_rows(
        &source,
        &all,
        |&row| row,
        |logits, _| rows::first_largest(logits, source.adjust()).map(|token| token as u32),
    )
}

/// `f` of the products of each item's row with the head, in the items' order; the products of a
/// chunk of rows exist at a time.
fn over_rows<T: Sync, R: Send>(
    source: &Source<'_>,
    items: &[T],
    row: impl Fn(&T) -> usize,
    f: impl Fn(&mut [f32], &T) -> R + Sync,
) -> Result<Vec<R>> {
    let vocab = source.vocab;
    if source.width == 0 || vocab == 0 {
        let message = format!("a head of {vocab} tokens over {} columns", source.width);
        return Err(Error::Invalid { op: OP, message });
    }
    let chunk_rows = chunk_rows(vocab).min(items.len());
    let mut logits = vec![0.0; chunk_rows * vocab];
    let mut results = Vec::with_capacity(items.len());
    for items in items.chunks(chunk_rows.max(1)) {
        let logits = &mut logits[..items.len() * vocab];
        let rows: Vec<usize> = items.iter().map(&row).collect();
        let h = Rows::gather(&source.hidden, source.width, &rows);
        source.multiply(&h, rows.len(), logits)?;
        let found = logits.par_chunks_mut(vocab).zip(items).map(|(logits, item)| f(logits, item));
        results.par_extend(found);
    }
    Ok(results)
}

/// The logits of `h` `[n, width]`, `[n, vocab]`: all of them, so for few rows.
///
/// # Errors
/// Shapes that do not fit, or no kernel for the device or dtype.
pub fn logits(h: &Tensor, head: &Head<'_>) -> Result<Tensor> {
    let (n, _) = dims2(h, OP, "h")?;
    check_head(h, head)?;
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() {
        return crate::cuda::loss::logits(h, head);
    }
    let source = Source::new(h, head)?;
    let mut logits = vec![0.0; n * source.vocab];
    source.multiply(&Rows::Run(0, &source.hidden), n, &mut logits)?;
    let by = source.adjust();
    logits.par_chunks_mut(source.vocab.max(1)).for_each(|row| rows::adjust_row(row, by));
    from_vec(logits, (n, source.vocab), h.device())
}
