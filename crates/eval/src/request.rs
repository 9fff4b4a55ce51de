//! From a request's two texts to the tokens that the model sees.
//!
//! A request asks how likely a continuation is after a context. The rules are those of
//! lm-evaluation-harness 0.4.13, so that its numbers come out:
//! - white space at the end of the context moves to the front of the continuation;
//! - context and continuation are tokenised jointly, and the continuation's tokens are
//!   those past the context's own token count; in front of them stands the context as it
//!   is tokenised alone (no repair where a token spans the boundary);
//! - BOS comes as the tokenizer itself would add it, and not twice where the text already
//!   starts with it;
//! - an empty context is the prefix token (BOS, else EOS), which a continuation that
//!   starts with it supplies itself;
//! - what exceeds the model's length is cut on the left.

use std::collections::HashMap;

use relufy_data::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::Result;

/// How likely is `continuation` after `context`?
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// What the model has read.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// A request in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Context and continuation, after truncation; at most the model's length + 1 (the
    /// last one is only predicted).
    pub ids: Vec<u32>,
    /// How many tokens at the end of `ids` are scored; less than `ids.len()`.
    pub continuation: usize,
    /// Context tokens (with BOS) before truncation.
    pub context: usize,
    /// Tokens cut on the left.
    pub truncated: usize,
}

/// Why a request cannot be scored. Its document is left out of the metrics, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Exclusion {
    /// The continuation adds no token to the context's.
    NoContinuationToken,
    /// The context is empty and the tokenizer has neither BOS nor EOS to stand for it.
    NoContextToken,
    /// The continuation alone is longer than the model's length.
    ContinuationTooLong,
}

impl std::fmt::Display for Exclusion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Exclusion::NoContinuationToken => "the continuation encodes to no token",
            Exclusion::NoContextToken => "the context encodes to no token",
            Exclusion::ContinuationTooLong => "the continuation is longer than the model's length",
        })
    }
}

/// Tokenises requests, each distinct text once and in parallel. `max_length` is the
/// longest input in tokens.
///
/// # Errors
/// The tokenizer's.
pub fn encode(
    requests: &[Request],
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<std::result::Result<Encoded, Exclusion>>> {
    let prefix = tokenizer.prefix_token();
    let prefix_text = match prefix {
        Some(id) => tokenizer.decode(&[id], false)?,
        None => String::new(),
    };
    let mut texts = Texts::default();
    let pieces: Vec<Piece> = requests
        .iter()
        .map(|request| {
            let (context, moved) = split_trailing_space(&request.context);
            if context.is_empty() && moved.is_empty() {
                return Piece::Alone(texts.add(request.continuation.clone(), false));
            }
            let mut special = |text: String| {
                // The text brings its own BOS, and a second would change the numbers.
                let has_bos = !prefix_text.is_empty() && text.starts_with(&prefix_text);
                texts.add(text, !has_bos)
            };
            Piece::Joint {
                whole: special(format!("{}{}", request.context, request.continuation)),
                context: special(context.to_owned()),
            }
        })
        .collect();
    let encoded = texts.encode(tokenizer)?;
    Ok(pieces
        .into_iter()
        .map(|piece| {
            let (ids, context) = match piece {
                Piece::Joint { whole, context } => {
                    let (whole, context) = (encoded.get(whole), encoded.get(context));
                    (join(whole, context), context.len())
                }
                Piece::Alone(text) => (encoded.get(text).to_vec(), 0),
            };
            finish(ids, context, prefix, max_length)
        })
        .collect())
}

/// The context's own tokens, and behind them those of the whole text past their number.
/// Where a token spans the boundary the two disagree; the harness repairs nothing.
fn join(whole: &[u32], context: &[u32]) -> Vec<u32> {
    let continuation = whole.get(context.len()..).unwrap_or_default();
    [context, continuation].concat()
}

/// Puts the prefix token in place of an empty context and cuts to the model's length.
fn finish(
    mut ids: Vec<u32>,
    mut context: usize,
    prefix: Option<u32>,
    max_length: usize,
) -> std::result::Result<Encoded, Exclusion> {
    let total = ids.len();
    if total <= context {
        return Err(Exclusion::NoContinuationToken);
    }
    if context == 0 {
        let prefix = prefix.ok_or(Exclusion::NoContextToken)?;
        if ids.first() != Some(&prefix) {
            ids.insert(0, prefix);
        }
        context = 1;
    }
    let continuation = ids.len() - context;
    if continuation == 0 {
        return Err(Exclusion::NoContinuationToken);
    }
    if continuation > max_length {
        return Err(Exclusion::ContinuationTooLong);
    }
    let truncated = ids.len().saturating_sub(max_length + 1);
    ids.drain(..truncated);
    Ok(Encoded { ids, continuation, context, truncated })
}

/// The context without its trailing white space (Python's `rstrip`), and that space.
fn split_trailing_space(context: &str) -> (&str, &str) {
    let end = context.trim_end_matches(is_python_space).len();
    context.split_at(end)
}

/// Python's `str.isspace`: Unicode's white space and the separators U+001C to U+001F.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// A request as indices of texts.
enum Piece {
    Joint { whole: Text, context: Text },
    Alone(Text),
}

/// A text to encode, with the special tokens or without.
#[derive(Clone, Copy)]
struct Text {
    special: bool,
    index: usize,
}

/// Distinct texts: the choices of one question share its context.
#[derive(Default)]
struct Texts {
    special: Distinct,
    plain: Distinct,
}

#[derive(Default)]
struct Distinct {
    index: HashMap<String, usize>,
}

impl Texts {
    fn add(&mut self, text: String, special: bool) -> Text {
        let distinct = if special { &mut self.special } else { &mut self.plain };
        let next = distinct.index.len();
        Text { special, index: *distinct.index.entry(text).or_insert(next) }
    }

    fn encode(self, tokenizer: &Tokenizer) -> Result<EncodedTexts> {
        let run = |distinct: Distinct, special: bool| {
            let mut texts: Vec<(String, usize)> = distinct.index.into_iter().collect();
            texts.sort_unstable_by_key(|(_, index)| *index);
            let texts: Vec<String> = texts.into_iter().map(|(text, _)| text).collect();
            tokenizer.encode_batch(&texts, special)
        };
        Ok(EncodedTexts { special: run(self.special, true)?, plain: run(self.plain, false)? })
    }
}

struct EncodedTexts {
    special: Vec<Vec<u32>>,
    plain: Vec<Vec<u32>>,
}

impl EncodedTexts {
    fn get(&self, text: Text) -> &[u32] {
        let texts = if text.special { &self.special } else { &self.plain };
        texts.get(text.index).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_space_is_pythons() {
        assert_eq!(split_trailing_space("a b \n"), ("a b", " \n"));
        assert_eq!(split_trailing_space("a\u{1f}\u{a0}"), ("a", "\u{1f}\u{a0}"));
        assert_eq!(split_trailing_space("a\u{200b}"), ("a\u{200b}", ""));
        assert_eq!(split_trailing_space("  "), ("", "  "));
    }

    #[test]
    fn a_token_across_the_boundary_is_not_repaired() {
        // ": s" may be [":", " s"] alone and [": ", "s"] jointly.
        assert_eq!(join(&[1, 7, 8, 9], &[1, 6]), [1, 6, 8, 9]);
        assert_eq!(join(&[1], &[1, 6]), [1, 6]);
    }

    #[test]
    fn long_requests_are_cut_on_the_left() {
        let got = finish((0..10).collect(), 7, Some(0), 5).unwrap();
        assert_eq!(got.ids, [4, 5, 6, 7, 8, 9]);
        assert_eq!((got.context, got.continuation, got.truncated), (7, 3, 4));
        // Exactly the model's length: nothing is cut, the last token is only predicted.
        assert_eq!(finish((0..6).collect(), 3, Some(0), 5).unwrap().truncated, 0);
    }

    #[test]
    fn an_empty_context_is_the_prefix_token() {
        let got = finish(vec![5, 6], 0, Some(1), 9).unwrap();
        assert_eq!((got.ids.as_slice(), got.context, got.continuation), (&[1, 5, 6][..], 1, 2));
        let got = finish(vec![1, 5, 6], 0, Some(1), 9).unwrap();
        assert_eq!((got.ids.as_slice(), got.context, got.continuation), (&[1, 5, 6][..], 1, 2));
        assert_eq!(finish(vec![5], 0, None, 9), Err(Exclusion::NoContextToken));
        assert_eq!(finish(vec![1], 0, Some(1), 9), Err(Exclusion::NoContinuationToken));
    }

    #[test]
    fn what_cannot_be_scored_is_named() {
        assert_eq!(finish(vec![1, 2], 2, Some(1), 9), Err(Exclusion::NoContinuationToken));
        assert_eq!(finish(vec![1, 2, 3, 4], 1, Some(1), 2), Err(Exclusion::ContinuationTooLong));
    }
}
