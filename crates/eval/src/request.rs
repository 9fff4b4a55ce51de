//! What a model is asked, and how its texts become the tokens that the model sees.
//!
//! The rules are those of lm-evaluation-harness, so that its numbers come out:
//! - white space at the end of the context moves to the front of the continuation;
//! - context and continuation are tokenised jointly, and the continuation's tokens are
//!   those past the context's own token count; in front of them stands the context as it
//!   is tokenised alone (no repair where a token spans the boundary);
//! - BOS comes as the tokenizer itself would add it (up to 0.4.9.1: never), and not twice
//!   where the text already starts with it;
//! - an empty context is the prefix token (BOS, else EOS), which a continuation that
//!   starts with it supplies itself;
//! - what exceeds the model's length is cut on the left.

use std::collections::HashMap;

use relufy_data::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::{Result, python};

/// One question to the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// How likely is `continuation` after `context`?
    Likelihood {
        /// What the model has read.
        context: String,
        /// What is scored.
        continuation: String,
    },
    /// How likely is a whole text, read in disjoint windows?
    Rolling {
        /// The text.
        text: String,
    },
    /// What does the model say after `context`? Greedy decoding.
    Generate {
        /// What the model has read.
        context: String,
        /// Texts that end the answer and are not part of it.
        until: Vec<String>,
        /// At most so many tokens.
        max_tokens: usize,
    },
}

impl Request {
    /// How likely is `continuation` after `context`?
    pub fn likelihood(context: impl Into<String>, continuation: impl Into<String>) -> Request {
        Request::Likelihood { context: context.into(), continuation: continuation.into() }
    }
}

/// Which release of lm-evaluation-harness is followed where releases differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compat {
    /// 0.4.13 (and all since 0.4.9.2): the tokenizer decides about BOS.
    #[default]
    #[serde(rename = "0.4.13")]
    Current,
    /// Up to 0.4.9.1, as the ReLU papers were measured: causal models get no BOS, and a
    /// generated answer keeps white space at its end.
    #[serde(rename = "0.4.9.1")]
    NoBos,
}

impl Compat {
    /// The harness's version.
    pub fn version(self) -> &'static str {
        match self {
            Compat::Current => "0.4.13",
            Compat::NoBos => "0.4.9.1",
        }
    }
}

/// How texts become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// Longest input in tokens.
    pub max_length: usize,
    /// The release that is followed.
    pub compat: Compat,
}

/// A request in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// Tokens whose end is scored.
    Likelihood(Scorable),
    /// The windows of a text; none of an empty one.
    Rolling(Vec<Scorable>),
    /// What the model continues.
    Prompt {
        /// The context's tokens, after truncation.
        ids: Vec<u32>,
        /// Tokens cut on the left.
        truncated: usize,
    },
}

/// Tokens whose end is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scorable {
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

impl Scorable {
    /// What enters the model: all but the last token.
    pub fn input(&self) -> &[u32] {
        self.ids.split_last().map_or(&[], |(_, input)| input)
    }

    /// What is predicted.
    pub fn targets(&self) -> &[u32] {
        &self.ids[self.ids.len() - self.continuation..]
    }
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
    /// There is nothing to continue, or the model has no room for an answer.
    NoRoomToGenerate,
}

impl std::fmt::Display for Exclusion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Exclusion::NoContinuationToken => "the continuation encodes to no token",
            Exclusion::NoContextToken => "the context encodes to no token",
            Exclusion::ContinuationTooLong => "the continuation is longer than the model's length",
            Exclusion::NoRoomToGenerate => "the model has no room for an answer",
        })
    }
}

/// Tokenises requests, each distinct text once and in parallel.
///
/// # Errors
/// The tokenizer's.
pub fn encode(
    requests: &[&Request],
    tokenizer: &Tokenizer,
    rules: Rules,
) -> Result<Vec<std::result::Result<Encoded, Exclusion>>> {
    let prefix = tokenizer.prefix_token();
    let prefix_text = match prefix {
        Some(id) => tokenizer.decode(&[id], false)?,
        None => String::new(),
    };
    // The text brings its own BOS, and a second would change the numbers.
    let special = |text: &str| {
        let has_bos = !prefix_text.is_empty() && text.starts_with(&prefix_text);
        rules.compat == Compat::Current && !has_bos
    };
    let mut texts = Texts::default();
    let pieces: Vec<Piece> = requests
        .iter()
        .map(|request| match request {
            Request::Likelihood { context, continuation } => {
                let (head, moved) = split_trailing_space(context);
                if head.is_empty() && moved.is_empty() {
                    return Piece::Alone(texts.add(continuation.clone(), false));
                }
                let whole = format!("{context}{continuation}");
                let (in_whole, in_head) = (special(&whole), special(head));
                Piece::Joint {
                    whole: texts.add(whole, in_whole),
                    context: texts.add(head.to_owned(), in_head),
                }
            }
            Request::Rolling { text } => Piece::Whole(texts.add(text.clone(), special(text))),
            Request::Generate { context, max_tokens, .. } => Piece::Prompt {
                context: texts.add(context.clone(), special(context)),
                max_tokens: *max_tokens,
            },
        })
        .collect();
    let encoded = texts.encode(tokenizer)?;
    Ok(pieces
        .into_iter()
        .map(|piece| match piece {
            Piece::Joint { whole, context } => {
                let (whole, context) = (encoded.get(whole), encoded.get(context));
                let ids = join(whole, context);
                finish(ids, context.len(), prefix, rules.max_length).map(Encoded::Likelihood)
            }
            Piece::Alone(text) => finish(encoded.get(text).to_vec(), 0, prefix, rules.max_length)
                .map(Encoded::Likelihood),
            Piece::Whole(text) => {
                let prefix = prefix.ok_or(Exclusion::NoContextToken)?;
                let ids: Vec<u32> =
                    std::iter::once(prefix).chain(encoded.get(text).iter().copied()).collect();
                Ok(Encoded::Rolling(rolling_windows(&ids, rules.max_length)))
            }
            Piece::Prompt { context, max_tokens } => {
                prompt(encoded.get(context), max_tokens, rules.max_length)
            }
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
) -> std::result::Result<Scorable, Exclusion> {
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
    Ok(Scorable { ids, continuation, context, truncated })
}

/// The harness's windows over a text: each predicts the next `max_length` tokens from the
/// one before them; the last one, which has fewer to predict, fills its input with what
/// stands to their left. `ids` leads with the prefix token, which is not predicted.
fn rolling_windows(ids: &[u32], max_length: usize) -> Vec<Scorable> {
    let last = ids.len().saturating_sub(1);
    (0..last)
        .step_by(max_length)
        .map(|start| {
            let end = (start + max_length).min(last);
            let first = end.saturating_sub(max_length);
            let continuation = end - start;
            let context = end + 1 - first - continuation;
            Scorable { ids: ids[first..=end].to_vec(), continuation, context, truncated: 0 }
        })
        .collect()
}

/// What the model continues: the end of the context that leaves room for the answer.
fn prompt(
    context: &[u32],
    max_tokens: usize,
    max_length: usize,
) -> std::result::Result<Encoded, Exclusion> {
    let room = max_length.saturating_sub(max_tokens);
    if room == 0 || context.is_empty() {
        return Err(Exclusion::NoRoomToGenerate);
    }
    let truncated = context.len().saturating_sub(room);
    Ok(Encoded::Prompt { ids: context[truncated..].to_vec(), truncated })
}

/// The context without its trailing white space (Python's `rstrip`), and that space.
fn split_trailing_space(context: &str) -> (&str, &str) {
    let end = context.trim_end_matches(python::is_space).len();
    context.split_at(end)
}

/// A request as indices of texts.
enum Piece {
    Joint { whole: Text, context: Text },
    Alone(Text),
    Whole(Text),
    Prompt { context: Text, max_tokens: usize },
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

    #[test]
    fn rolling_windows_predict_each_token_once() {
        // The prefix token and ten more, at most four tokens of input.
        let ids: Vec<u32> = (0..11).collect();
        let windows = rolling_windows(&ids, 4);
        let inputs: Vec<&[u32]> = windows.iter().map(Scorable::input).collect();
        assert_eq!(inputs, [&[0, 1, 2, 3][..], &[4, 5, 6, 7], &[6, 7, 8, 9]]);
        let targets: Vec<&[u32]> = windows.iter().map(Scorable::targets).collect();
        assert_eq!(targets, [&[1, 2, 3, 4][..], &[5, 6, 7, 8], &[9, 10]]);
        assert_eq!(windows[2].context, 3);
        assert!(rolling_windows(&[0], 4).is_empty());
    }

    #[test]
    fn a_prompt_leaves_room_for_its_answer() {
        let got = prompt(&[1, 2, 3, 4, 5], 6, 9);
        assert_eq!(got, Ok(Encoded::Prompt { ids: vec![3, 4, 5], truncated: 2 }));
        assert_eq!(prompt(&[1], 9, 9), Err(Exclusion::NoRoomToGenerate));
    }
}
