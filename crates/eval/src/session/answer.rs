//! What a model answers, and the documents whose answers are still coming in.

use serde::{Deserialize, Serialize};

use super::Done;
use crate::Result;
use crate::activity::Activity;
use crate::request::{Exclusion, Request};

/// What the model says about a continuation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// What the model answers to one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To a continuation.
    Likelihood(Scored),
    /// To a whole text: its log-likelihood, and how many tokens were predicted.
    Rolling {
        /// Natural logarithm of the text's probability.
        logprob: f64,
        /// Tokens predicted.
        tokens: u64,
    },
    /// To a prompt: what it says, up to where it should stop.
    Text(String),
}

impl Answer {
    /// The log-likelihood; NaN of generated text, which has none.
    pub fn logprob(&self) -> f64 {
        match self {
            Answer::Likelihood(scored) => scored.logprob,
            Answer::Rolling { logprob, .. } => *logprob,
            Answer::Text(_) => f64::NAN,
        }
    }

    /// Whether greedy decoding would say it.
    pub fn is_greedy(&self) -> bool {
        matches!(self, Answer::Likelihood(scored) if scored.is_greedy)
    }

    /// The generated text; empty of what was only scored.
    pub fn text(&self) -> &str {
        match self {
            Answer::Text(text) => text,
            _ => "",
        }
    }
}

/// What the model answers to a document's requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answered {
    /// One for each request, in their order.
    pub answers: Vec<std::result::Result<Answer, Exclusion>>,
    /// Of all tokens that the requests' inputs have.
    pub activity: Activity,
}

/// Documents whose answers come in piece by piece and in any order.
pub(super) struct Open {
    documents: Vec<Partial>,
    /// The document of each request, and its place there.
    places: Vec<(usize, usize)>,
}

struct Partial {
    slots: Vec<Slot>,
    activity: Activity,
}

/// A request: complete once it has an answer of which nothing is missing.
#[derive(Default)]
struct Slot {
    answer: Option<std::result::Result<Answer, Exclusion>>,
    /// Pieces (windows of a text) that are still to come.
    missing: usize,
}

impl Slot {
    fn is_complete(&self) -> bool {
        self.answer.is_some() && self.missing == 0
    }
}

impl Open {
    pub(super) fn new(documents: &[&[Request]], layers: usize) -> Open {
        let places = documents
            .iter()
            .enumerate()
            .flat_map(|(document, requests)| (0..requests.len()).map(move |at| (document, at)))
            .collect();
        let partial = |requests: &&[Request]| Partial {
            slots: requests.iter().map(|_| Slot::default()).collect(),
            activity: Activity::new(layers),
        };
        Open { documents: documents.iter().map(partial).collect(), places }
    }

    /// A request that cannot be answered.
    pub(super) fn exclude(&mut self, request: usize, reason: Exclusion) {
        *self.slot(request) = Slot { answer: Some(Err(reason)), missing: 0 };
    }

    /// A text that is read in so many windows.
    pub(super) fn expect_windows(&mut self, request: usize, windows: usize) {
        let nothing = Answer::Rolling { logprob: 0.0, tokens: 0 };
        *self.slot(request) = Slot { answer: Some(Ok(nothing)), missing: windows };
    }

    /// Reports the documents that are complete before the model was asked anything;
    /// returns how many requests that settles, those of other documents included.
    pub(super) fn settle(&self, done: &mut Done<'_>) -> Result<usize> {
        for document in 0..self.documents.len() {
            self.report(document, done)?;
        }
        let slots = self.documents.iter().flat_map(|document| &document.slots);
        Ok(slots.filter(|slot| slot.is_complete()).count())
    }

    /// A continuation or window; whether its request is complete now.
    pub(super) fn scored(
        &mut self,
        request: usize,
        scored: Scored,
        activity: &Activity,
        done: &mut Done<'_>,
    ) -> Result<bool> {
        let slot = self.slot(request);
        slot.missing = slot.missing.saturating_sub(1);
        slot.answer = Some(Ok(match slot.answer.take() {
            Some(Ok(Answer::Rolling { logprob, tokens })) => Answer::Rolling {
                logprob: logprob + scored.logprob,
                tokens: tokens + scored.continuation_tokens as u64,
            },
            _ => Answer::Likelihood(scored),
        }));
        let complete = slot.is_complete();
        self.count(request, activity, done)?;
        Ok(complete)
    }

    /// A generated text.
    pub(super) fn said(
        &mut self,
        request: usize,
        text: String,
        activity: &Activity,
        done: &mut Done<'_>,
    ) -> Result<()> {
        *self.slot(request) = Slot { answer: Some(Ok(Answer::Text(text))), missing: 0 };
        self.count(request, activity, done)
    }

    /// All answers.
    pub(super) fn finish(self) -> Vec<Answered> {
        self.documents.iter().filter_map(Partial::answered).collect()
    }

    fn slot(&mut self, request: usize) -> &mut Slot {
        let (document, at) = self.places[request];
        &mut self.documents[document].slots[at]
    }

    /// Adds activity to a request's document and reports it once it is complete.
    fn count(&mut self, request: usize, activity: &Activity, done: &mut Done<'_>) -> Result<()> {
        let (document, _) = self.places[request];
        self.documents[document].activity.add(activity);
        self.report(document, done)
    }

    fn report(&self, document: usize, done: &mut Done<'_>) -> Result<()> {
        match self.documents[document].answered() {
            Some(answered) => done(document, &answered),
            None => Ok(()),
        }
    }
}

impl Partial {
    fn answered(&self) -> Option<Answered> {
        let complete = self.slots.iter().all(Slot::is_complete);
        let answers = self.slots.iter().filter_map(|slot| slot.answer.clone());
        complete.then(|| Answered { answers: answers.collect(), activity: self.activity.clone() })
    }
}
