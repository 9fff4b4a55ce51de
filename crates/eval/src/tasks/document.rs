//! The shapes a document can have, and what its scores say.

use crate::metrics::{Metric, first_argmax};
use crate::request::Request;
use crate::session::Scored;

/// The requests that one record becomes, and how they are judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    requests: Vec<Request>,
    form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    /// One request a choice: the likeliest should be `gold`.
    Choice { gold: usize, characters: Vec<usize> },
    /// One request: its continuation should be what the model would say.
    Target,
}

impl Document {
    /// Several continuations of one context, of which `gold` is right. A blank joins
    /// context and choice.
    pub fn choice(context: String, choices: &[&str], gold: usize) -> Document {
        let requests = choices
            .iter()
            .map(|choice| Request { context: context.clone(), continuation: format!(" {choice}") })
            .collect();
        let characters = choices.iter().map(|choice| choice.chars().count()).collect();
        Document { requests, form: Form::Choice { gold, characters } }
    }

    /// One continuation of several contexts, of which `gold` is right (partial evaluation).
    pub fn contexts(contexts: Vec<String>, continuation: &str, gold: usize) -> Document {
        let characters = vec![continuation.chars().count(); contexts.len()];
        let requests = contexts
            .into_iter()
            .map(|context| Request { context, continuation: format!(" {continuation}") })
            .collect();
        Document { requests, form: Form::Choice { gold, characters } }
    }

    /// A continuation that the model should predict by itself. Nothing joins the two.
    pub fn target(context: String, continuation: String) -> Document {
        Document { requests: vec![Request { context, continuation }], form: Form::Target }
    }

    /// What the model is asked.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// This document's value of `metric`, given one score for each request. For
    /// perplexity it is the log-likelihood, which the metric aggregates.
    pub fn value(&self, metric: Metric, scores: &[Scored]) -> f64 {
        let right = match (&self.form, metric) {
            (_, Metric::Perplexity | Metric::BitsPerByte) => {
                return scores.iter().map(|score| score.logprob).sum();
            }
            (Form::Target, _) => scores.iter().all(|score| score.is_greedy),
            (Form::Choice { gold, characters }, Metric::AccNorm) => {
                let normed = scores.iter().zip(characters);
                first_argmax(normed.map(|(score, n)| score.logprob / *n as f64)) == *gold
            }
            (Form::Choice { gold, .. }, Metric::Acc) => {
                first_argmax(scores.iter().map(|score| score.logprob)) == *gold
            }
        };
        f64::from(u8::from(right))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(logprob: f64) -> Scored {
        Scored {
            logprob,
            is_greedy: false,
            context_tokens: 1,
            continuation_tokens: 1,
            truncated: 0,
        }
    }

    #[test]
    fn acc_norm_divides_by_characters_not_bytes() {
        // Four characters each, the second eight bytes.
        let document = Document::choice("Q".into(), &["abcd", "éééé", "a"], 1);
        assert_eq!(document.requests()[1].continuation, " éééé");
        let scores = [scored(-4.4), scored(-4.0), scored(-1.5)];
        assert_eq!(document.value(Metric::Acc, &scores), 0.0);
        assert_eq!(document.value(Metric::AccNorm, &scores), 1.0);
        // By bytes (0.5 a byte) it would win here too; by characters it must not.
        let scores = [scored(-3.6), scored(-4.0), scored(-1.5)];
        assert_eq!(document.value(Metric::AccNorm, &scores), 0.0);
    }

    #[test]
    fn a_target_is_right_where_it_is_greedy() {
        let document = Document::target("a".into(), " b".into());
        assert_eq!(document.value(Metric::Acc, &[scored(-0.1)]), 0.0);
        assert_eq!(document.value(Metric::Perplexity, &[scored(-0.1)]), -0.1);
        let greedy = Scored { is_greedy: true, ..scored(-9.0) };
        assert_eq!(document.value(Metric::Acc, &[greedy]), 1.0);
    }
}
