//! The seam between tasks and the model: how likely is a continuation, how likely is a
//! text, what does the model say?

mod answer;
mod generate;
mod score;
mod tree;

pub use answer::{Answer, Answered, Scored};
use relufy_data::{Progress, Tokenizer};
use relufy_model::Decoder;

use self::score::Job;
use crate::activity::Activity;
use crate::request::{self, Compat, Encoded, Exclusion, Request, Rules, Scorable};
use crate::{Error, Result};

/// How a session runs its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Longest input in tokens; `None`: the model's positions.
    pub max_length: Option<usize>,
    /// Tokens of one forward pass; a longer run of tokens has a pass of its own.
    pub tokens_per_batch: usize,
    /// Which release of lm-evaluation-harness is followed.
    pub compat: Compat,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions { max_length: None, tokens_per_batch: 2048, compat: Compat::Current }
    }
}

/// A model with its tokenizer, ready to answer requests.
pub struct Session<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a Tokenizer,
    rules: Rules,
    tokens_per_batch: usize,
}

/// Told of each document as soon as all its requests are answered: its index, and what
/// the model says.
pub type Done<'a> = dyn FnMut(usize, &Answered) -> Result<()> + 'a;

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
        let rules = Rules { max_length, compat: options.compat };
        Ok(Session { decoder, tokenizer, rules, tokens_per_batch: options.tokens_per_batch })
    }

    /// The model.
    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    /// How texts become tokens.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Longest input in tokens.
    pub fn max_length(&self) -> usize {
        self.rules.max_length
    }

    /// Answers the requests of some documents, in the order given. `done` hears of each
    /// document when it is finished; `progress` advances by one for each request.
    ///
    /// # Errors
    /// The tokenizer's and the model's; a log-likelihood that is no number; what `done`
    /// returns.
    pub fn answer(
        &self,
        documents: &[&[Request]],
        progress: &dyn Progress,
        done: &mut Done<'_>,
    ) -> Result<Vec<Answered>> {
        let requests: Vec<&Request> = documents.iter().copied().flatten().collect();
        let encoded = request::encode(&requests, self.tokenizer, self.rules)?;
        let layers = self.decoder.spec().layers.len();
        let mut open = answer::Open::new(documents, layers);
        let (mut jobs, mut prompts) = (Vec::new(), Vec::new());
        for (index, (encoded, request)) in encoded.into_iter().zip(&requests).enumerate() {
            match (encoded, *request) {
                (Err(reason), _) => open.exclude(index, reason),
                (Ok(Encoded::Likelihood(scorable)), _) => {
                    jobs.push(Job { request: index, scorable })
                }
                (Ok(Encoded::Rolling(windows)), _) => {
                    open.expect_windows(index, windows.len());
                    jobs.extend(
                        windows.into_iter().map(|scorable| Job { request: index, scorable }),
                    );
                }
                (Ok(Encoded::Prompt { ids, .. }), Request::Generate { until, max_tokens, .. }) => {
                    prompts.push(generate::Prompt { request: index, ids, until, max: *max_tokens });
                }
                (Ok(Encoded::Prompt { .. }), _) => open.exclude(index, Exclusion::NoRoomToGenerate),
            }
        }
        progress.advance(open.settle(done)? as u64);
        self.score(&jobs, &mut |job, scored, activity| {
            if open.scored(job.request, scored, activity, done)? {
                progress.advance(1);
            }
            Ok(())
        })?;
        self.generate(&prompts, &mut |request, text, activity| {
            open.said(request, text, activity, done)?;
            progress.advance(1);
            Ok(())
        })?;
        Ok(open.finish())
    }

    /// Scores windows of running text; `each` hears of each by its index, in any order.
    pub(crate) fn score_windows(
        &self,
        windows: Vec<Scorable>,
        each: &mut dyn FnMut(usize, Scored, &Activity),
    ) -> Result<()> {
        let job = |(request, scorable)| Job { request, scorable };
        let jobs: Vec<Job> = windows.into_iter().enumerate().map(job).collect();
        self.score(&jobs, &mut |job, scored, activity| {
            each(job.request, scored, activity);
            Ok(())
        })
    }

    /// Activity of nothing.
    fn no_activity(&self) -> Activity {
        Activity::new(self.decoder.spec().layers.len())
    }
}
