//! The seam between tasks and the model: how likely is a continuation after a context?
//!
//! Requests are sorted by length and packed one behind the other, each a segment that
//! attends only to itself: no padding is computed. Only the positions that predict a
//! continuation token pass the head, and never as a whole matrix of logits.

use std::ops::Range;

use candle_core::Tensor;
use relufy_data::{Progress, Tokenizer};
use relufy_model::{Decoder, Tap, Tokens};

use crate::request::{self, Encoded, Exclusion, Request};
use crate::{Error, Result};

/// How a session runs its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Longest input in tokens; `None`: the model's positions.
    pub max_length: Option<usize>,
    /// Tokens of one forward pass; a longer request runs alone.
    pub tokens_per_batch: usize,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions { max_length: None, tokens_per_batch: 2048 }
    }
}

/// A model with its tokenizer, ready to answer requests.
pub struct Session<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    max_length: usize,
    tokens_per_batch: usize,
}

/// What the model says about one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Natural logarithm of the continuation's probability, summed over its tokens.
    pub logprob: f64,
    /// Whether every token of the continuation is the most likely one.
    pub is_greedy: bool,
    /// Context tokens (with BOS) before truncation.
    pub context_tokens: usize,
    /// Continuation tokens.
    pub continuation_tokens: usize,
    /// Tokens cut on the left.
    pub truncated: usize,
}

impl<'a> Session<'a> {
    /// A session.
    ///
    /// # Errors
    /// A `max_length` of 0 or beyond the model's positions, or an empty batch.
    pub fn new(
        decoder: &'a Decoder,
        tokenizer: &'a Tokenizer,
        options: SessionOptions,
    ) -> Result<Session<'a>> {
        let positions = decoder.spec().max_positions;
        let max_length = options.max_length.unwrap_or(positions);
        if !(1..=positions).contains(&max_length) {
            return Err(Error::Setting {
                what: "max_length",
                expected: format!("1 to {positions} (the model's positions)"),
                found: max_length.to_string(),
            });
        }
        if options.tokens_per_batch == 0 {
            return Err(Error::Setting {
                what: "tokens_per_batch",
                expected: "at least 1".into(),
                found: "0".into(),
            });
        }
        Ok(Session { decoder, tokenizer, max_length, tokens_per_batch: options.tokens_per_batch })
    }

    /// The model.
    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// Longest input in tokens.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Log-likelihood of each request's continuation, in the order given.
    ///
    /// `tap` sees every token that enters the model, once per request: contexts and all
    /// continuation tokens but the last, which is only predicted. `progress` advances
    /// by one for each request.
    ///
    /// # Errors
    /// The tokenizer's and the model's; a log-likelihood that is no number.
    pub fn loglikelihood(
        &self,
        requests: &[Request],
        tap: &mut dyn Tap,
        progress: &dyn Progress,
    ) -> Result<Vec<std::result::Result<Scored, Exclusion>>> {
        let encoded = request::encode(requests, self.tokenizer, self.max_length)?;
        let runnable: Vec<(usize, &Encoded)> = encoded
            .iter()
            .enumerate()
            .filter_map(|(index, request)| Some((index, request.as_ref().ok()?)))
            .collect();
        progress.advance((requests.len() - runnable.len()) as u64);
        let sequences: Vec<Sequence<'_>> = runnable
            .iter()
            .map(|(_, request)| Sequence { ids: &request.ids, scored: request.continuation })
            .collect();
        let mut scores = vec![(0.0, false); requests.len()];
        for ((index, _), score) in runnable.iter().zip(self.score(&sequences, tap, progress)?) {
            scores[*index] = score;
        }
        Ok(encoded
            .into_iter()
            .zip(scores)
            .map(|(request, (logprob, is_greedy))| {
                request.map(|request| Scored {
                    logprob,
                    is_greedy,
                    context_tokens: request.context,
                    continuation_tokens: request.continuation,
                    truncated: request.truncated,
                })
            })
            .collect())
    }

    /// Log-likelihood (summed) and greediness of the scored end of each sequence.
    pub(crate) fn score(
        &self,
        sequences: &[Sequence<'_>],
        tap: &mut dyn Tap,
        progress: &dyn Progress,
    ) -> Result<Vec<(f64, bool)>> {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.input().len()).collect();
        let (order, batches) = batches(&lengths, self.tokens_per_batch);
        let mut scores = vec![(0.0, true); sequences.len()];
        for batch in batches {
            let members = &order[batch];
            let packed = Packed::new(members.iter().map(|&index| sequences[index]));
            let hidden = self.decoder.hidden(&packed.tokens, tap)?;
            let rows = Tensor::from_slice(&packed.rows, packed.rows.len(), hidden.device())?;
            let hidden = hidden.index_select(&rows, 0)?;
            let mut tokens = self.decoder.score(&hidden, &packed.targets)?.into_iter();
            for &index in members {
                let sequence = sequences[index];
                // The targets lead: the side that leads a zip loses an item at its end.
                for (&target, token) in sequence.targets().iter().zip(tokens.by_ref()) {
                    if !token.logprob.is_finite() {
                        let found = token.logprob;
                        return Err(Error::NotFinite { found, token: target, request: index });
                    }
                    scores[index].0 += f64::from(token.logprob);
                    scores[index].1 &= token.greedy;
                }
            }
            progress.advance(members.len() as u64);
        }
        Ok(scores)
    }
}

/// Tokens of which the last `scored` are predicted; at least one stands before them.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a> {
    pub(crate) ids: &'a [u32],
    pub(crate) scored: usize,
}

impl<'a> Sequence<'a> {
    /// What enters the model: all but the last token.
    fn input(self) -> &'a [u32] {
        self.ids.split_last().map_or(&[], |(_, input)| input)
    }

    /// What is predicted.
    fn targets(self) -> &'a [u32] {
        &self.ids[self.ids.len() - self.scored..]
    }
}

/// Sequences one behind the other, as one forward pass reads them.
struct Packed {
    tokens: Tokens,
    /// Rows of the hidden states that predict a scored token.
    rows: Vec<u32>,
    /// What those rows predict.
    targets: Vec<i64>,
}

impl Packed {
    fn new<'a>(sequences: impl Iterator<Item = Sequence<'a>>) -> Packed {
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for sequence in sequences {
            ids.extend_from_slice(sequence.input());
            lengths.push(sequence.input().len());
            rows.extend((ids.len() - sequence.scored..ids.len()).map(|row| row as u32));
            targets.extend(sequence.targets().iter().map(|&id| i64::from(id)));
        }
        Packed { tokens: Tokens::packed(ids, lengths), rows, targets }
    }
}

/// Indices by falling length (the largest batch comes first, so that too little memory
/// shows at once) and the ranges of that order which run together: at most `budget`
/// tokens, or a single sequence.
fn batches(lengths: &[usize], budget: usize) -> (Vec<usize>, Vec<Range<usize>>) {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let (mut ranges, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (at, &index) in order.iter().enumerate() {
        if at > start && tokens + lengths[index] > budget {
            ranges.push(start..at);
            (start, tokens) = (at, 0);
        }
        tokens += lengths[index];
    }
    if start < order.len() {
        ranges.push(start..order.len());
    }
    (order, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_the_budget_or_one_sequence() {
        let (order, ranges) = batches(&[3, 9, 1, 4, 4], 8);
        assert_eq!(order, [1, 3, 4, 0, 2]);
        assert_eq!(ranges, [0..1, 1..3, 3..5]);
        assert!(batches(&[], 8).1.is_empty());
    }

    #[test]
    fn packing_gathers_the_rows_before_each_scored_token() {
        let sequences =
            [Sequence { ids: &[1, 2, 3, 4], scored: 2 }, Sequence { ids: &[5, 6], scored: 1 }];
        let packed = Packed::new(sequences.into_iter());
        assert_eq!(packed.tokens.ids, [1, 2, 3, 5]);
        assert_eq!(packed.tokens.positions, [0, 1, 2, 0]);
        assert_eq!(packed.rows, [1, 2, 3]);
        assert_eq!(packed.targets, [3, 4, 6]);
        assert_eq!((packed.tokens.segments[1].q_start, packed.tokens.segments[1].kv_len), (3, 1));
    }
}
