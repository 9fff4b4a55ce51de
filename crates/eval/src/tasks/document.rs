//! The shapes a document can have, and what its answers say.

use serde_json::Value;

use crate::metrics::{Metric, Point, first_argmax};
use crate::request::{Compat, Request};
use crate::session::Answer;
use crate::{normalize, python};

/// The requests that one record becomes, and how they are judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    requests: Vec<Request>,
    form: Form,
    target: Value,
}

#[derive(Clone, Debug, PartialEq)]
enum Form {
    /// One request a choice: the likeliest should be `gold`.
    Choice { gold: usize, characters: Vec<usize> },
    /// One request: its continuation should be what the model would say.
    Target,
    /// A text of so many words and bytes.
    Text { words: usize, bytes: usize },
    /// What the model says should be one of these.
    Spoken { aliases: Vec<String> },
}

impl Document {
    /// Several continuations of one context, of which `gold` is right. A blank joins
    /// context and choice.
    pub fn choice(context: String, choices: &[&str], gold: usize) -> Document {
        let requests = choices
            .iter()
            .map(|choice| Request::likelihood(context.clone(), format!(" {choice}")))
            .collect();
        let characters = choices.iter().map(|choice| choice.chars().count()).collect();
        Document { requests, form: Form::Choice { gold, characters }, target: gold.into() }
    }

    /// One continuation of several contexts, of which `gold` is right (partial evaluation).
    pub fn contexts(contexts: Vec<String>, continuation: &str, gold: usize) -> Document {
        let characters = vec![continuation.chars().count(); contexts.len()];
        let requests = contexts
            .into_iter()
            .map(|context| Request::likelihood(context, format!(" {continuation}")))
            .collect();
        Document { requests, form: Form::Choice { gold, characters }, target: continuation.into() }
    }

    /// A continuation that the model should predict by itself. Nothing joins the two.
    pub fn target(context: String, continuation: String) -> Document {
        let target = continuation.clone().into();
        let requests = vec![Request::Likelihood { context, continuation }];
        Document { requests, form: Form::Target, target }
    }

    /// A whole text, of which each word and byte is to be predicted. Both are counted in
    /// `original`, `text` is what the model reads. Words are the pieces between white space,
    /// with the empty ones at the ends.
    pub fn text(text: String, original: &str) -> Document {
        let words = python::count_split(original);
        let form = Form::Text { words, bytes: original.len() };
        Document {
            requests: vec![Request::Rolling { text: text.clone() }],
            form,
            target: text.into(),
        }
    }

    /// A question whose answer, greedily decoded, should be one of `aliases` but for case
    /// and punctuation.
    pub fn spoken(
        context: String,
        until: &[&str],
        max_tokens: usize,
        aliases: Vec<String>,
    ) -> Document {
        let until = until.iter().map(|stop| (*stop).to_owned()).collect();
        Document {
            requests: vec![Request::Generate { context, until, max_tokens }],
            target: aliases.clone().into(),
            form: Form::Spoken { aliases },
        }
    }

    /// The same document with `target` as what the harness's samples show as right.
    pub fn with_target(self, target: impl Into<Value>) -> Document {
        Document { target: target.into(), ..self }
    }

    /// The same document with `text` in front of each context.
    pub fn after(mut self, text: &str) -> Document {
        for request in &mut self.requests {
            match request {
                Request::Likelihood { context, .. } | Request::Generate { context, .. } => {
                    context.insert_str(0, text);
                }
                Request::Rolling { .. } => {}
            }
        }
        self
    }

    /// The document with its right answer, as an example in front of another question; empty
    /// for a text.
    pub(super) fn example(&self) -> String {
        let right = match &self.form {
            Form::Choice { gold, .. } => self.requests.get(*gold),
            Form::Target | Form::Text { .. } | Form::Spoken { .. } => self.requests.first(),
        };
        match (right, &self.form) {
            // The harness leaves even the delimiters away where there is nothing to say.
            (Some(Request::Likelihood { context, .. }), _) if self.target == "" => context.clone(),
            // A target brings its blank, and gets the delimiter all the same.
            (Some(Request::Likelihood { context, continuation }), Form::Target) => {
                format!("{context} {continuation}\n\n")
            }
            (Some(Request::Likelihood { context, continuation }), _) => {
                format!("{context}{continuation}\n\n")
            }
            (Some(Request::Generate { context, .. }), Form::Spoken { aliases }) => {
                let said = aliases.first().map_or("", String::as_str);
                format!("{context} {said}\n\n")
            }
            _ => String::new(),
        }
    }

    /// What the model is asked.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// What is right, as the harness's samples show it.
    pub fn right(&self) -> &Value {
        &self.target
    }

    /// This document's value of `metric`, given one answer for each request.
    pub fn value(&self, metric: Metric, answers: &[Answer], compat: Compat) -> Point {
        let sum = || answers.iter().map(Answer::logprob).sum::<f64>();
        let right = match (&self.form, metric) {
            (Form::Text { words, .. }, Metric::WordPerplexity) => {
                return Point { value: sum(), weight: *words as f64 };
            }
            (Form::Text { bytes, .. }, Metric::BytePerplexity | Metric::BitsPerByte) => {
                return Point { value: sum(), weight: *bytes as f64 };
            }
            (Form::Text { .. }, _) | (_, Metric::Perplexity) => return Point::of(sum()),
            (Form::Target, _) => answers.iter().all(Answer::is_greedy),
            (Form::Choice { gold, characters }, Metric::AccNorm) => {
                let normed = answers.iter().zip(characters);
                first_argmax(normed.map(|(answer, n)| answer.logprob() / *n as f64)) == *gold
            }
            (Form::Choice { gold, .. }, _) => {
                first_argmax(answers.iter().map(Answer::logprob)) == *gold
            }
            (Form::Spoken { aliases }, _) => answers.iter().all(|answer| {
                normalize::matches_any(normalize::stripped(answer.text(), compat), aliases)
            }),
        };
        Point::of(f64::from(u8::from(right)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Scored;

    fn scored(logprob: f64, is_greedy: bool) -> Answer {
        Answer::Likelihood(Scored {
            logprob,
            is_greedy,
            context_tokens: 1,
            continuation_tokens: 1,
            truncated: 0,
        })
    }

    fn value(document: &Document, metric: Metric, answers: &[Answer]) -> f64 {
        document.value(metric, answers, Compat::Current).value
    }

    #[test]
    fn acc_norm_divides_by_characters_not_bytes() {
        // Four characters each, the second eight bytes.
        let document = Document::choice("Q".into(), &["abcd", "éééé", "a"], 1);
        assert_eq!(document.requests()[1], Request::likelihood("Q", " éééé"));
        let answers = [-4.4, -4.0, -1.5].map(|logprob| scored(logprob, false));
        assert_eq!(value(&document, Metric::Acc, &answers), 0.0);
        assert_eq!(value(&document, Metric::AccNorm, &answers), 1.0);
        // By bytes (0.5 a byte) it would win here too; by characters it must not.
        let answers = [-3.6, -4.0, -1.5].map(|logprob| scored(logprob, false));
        assert_eq!(value(&document, Metric::AccNorm, &answers), 0.0);
    }

    #[test]
    fn a_target_is_right_where_it_is_greedy() {
        let document = Document::target("a".into(), " b".into());
        assert_eq!(value(&document, Metric::Acc, &[scored(-0.1, false)]), 0.0);
        assert_eq!(value(&document, Metric::Perplexity, &[scored(-0.1, false)]), -0.1);
        assert_eq!(value(&document, Metric::Acc, &[scored(-9.0, true)]), 1.0);
    }

    #[test]
    fn a_text_counts_words_and_bytes_of_the_original() {
        let document = Document::text("it's é".into(), "it 's é\n");
        let point = |metric| document.value(metric, &[scored(-6.0, false)], Compat::Current);
        assert_eq!(point(Metric::WordPerplexity), Point { value: -6.0, weight: 4.0 });
        assert_eq!(point(Metric::BitsPerByte), Point { value: -6.0, weight: 9.0 });
    }

    #[test]
    fn what_is_said_is_compared_without_case_and_punctuation() {
        let document = Document::spoken("Q".into(), &["\n"], 9, vec!["J.R.R. Tolkien".into()]);
        let said = |text: &str, compat| {
            document.value(Metric::ExactMatch, &[Answer::Text(text.into())], compat).value
        };
        assert_eq!(said(" jrr tolkien ", Compat::Current), 1.0);
        assert_eq!(said(" jrr tolkien ", Compat::NoBos), 0.0);
        assert_eq!(said(" jrr  tolkien", Compat::Current), 0.0);
    }

    #[test]
    fn examples_end_in_the_right_answer() {
        let choice = Document::choice("Q:".into(), &["a", "b"], 1);
        assert_eq!(choice.example(), "Q: b\n\n");
        let contexts = vec!["x A".into(), "x B".into()];
        assert_eq!(Document::contexts(contexts.clone(), "end", 1).example(), "x B end\n\n");
        assert_eq!(Document::contexts(contexts, "", 0).example(), "x A");
        assert_eq!(Document::target("a".into(), " b".into()).example(), "a  b\n\n");
        let spoken = Document::spoken("Q:".into(), &["\n"], 9, vec!["a".into(), "b".into()]);
        assert_eq!(spoken.example(), "Q: a\n\n");
        assert_eq!(Document::text("a".into(), "a").example(), "");
    }

    #[test]
    fn text_in_front_reaches_every_context() {
        let document = Document::contexts(vec!["a".into(), "b".into()], "c", 0).after("x ");
        let contexts = [Request::likelihood("x a", " c"), Request::likelihood("x b", " c")];
        assert_eq!(document.requests(), contexts);
    }
}
