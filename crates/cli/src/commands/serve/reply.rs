//! Answers in OpenAI's form, whole and in pieces.

use serde_json::{Value, json};

use super::job::Finish;
use super::request::Kind;

/// What all pieces of an answer have in common.
#[derive(Clone, Debug)]
pub struct Reply {
    pub kind: Kind,
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    /// What clients should know of how the model is computed.
    pub fingerprint: Option<String>,
}

/// How many tokens went in and came out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    pub new: usize,
}

impl Usage {
    fn body(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
        })
    }
}

impl Reply {
    /// The whole answer: a text and why it ended, for each prompt.
    pub fn whole(&self, texts: Vec<(String, Finish)>, usage: Usage) -> Value {
        let choices = texts.into_iter().enumerate().map(|(index, (text, finish))| {
            let mut choice = json!({"index": index});
            match self.kind {
                Kind::Completion => choice["text"] = text.into(),
                Kind::Chat => {
                    choice["message"] =
                        json!({"role": "assistant", "content": text, "refusal": null});
                }
            }
            choice["logprobs"] = Value::Null;
            choice["finish_reason"] = finish.name().into();
            choice
        });
        let mut body = self.body(choices.collect(), false);
        body["usage"] = usage.body();
        body
    }

    /// Says who speaks, where that is said; before any text.
    pub fn opening(&self) -> Option<Value> {
        let opening = json!({"role": "assistant", "content": ""});
        (self.kind == Kind::Chat).then(|| self.delta(0, opening, None))
    }

    /// More text.
    pub fn piece(&self, index: usize, text: &str) -> Value {
        match self.kind {
            Kind::Completion => self.text(index, text, None),
            Kind::Chat => self.delta(index, json!({"content": text}), None),
        }
    }

    /// A text has ended.
    pub fn end(&self, index: usize, finish: Finish) -> Value {
        match self.kind {
            Kind::Completion => self.text(index, "", Some(finish)),
            Kind::Chat => self.delta(index, json!({}), Some(finish)),
        }
    }

    /// The last piece, for who asked for it.
    pub fn usage(&self, usage: Usage) -> Value {
        let mut body = self.body(Vec::new(), true);
        body["usage"] = usage.body();
        body
    }

    fn text(&self, index: usize, text: &str, finish: Option<Finish>) -> Value {
        let choice = json!({"index": index, "text": text, "logprobs": null,
            "finish_reason": finish.map(Finish::name)});
        self.body(vec![choice], true)
    }

    fn delta(&self, index: usize, delta: Value, finish: Option<Finish>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": null,
            "finish_reason": finish.map(Finish::name)});
        self.body(vec![choice], true)
    }

    fn body(&self, choices: Vec<Value>, piece: bool) -> Value {
        let object = match (self.kind, piece) {
            // Pieces of completions have no name of their own.
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        let mut body = json!({"id": self.id, "object": object, "created": self.created,
            "model": self.model, "choices": choices});
        if let Some(fingerprint) = &self.fingerprint {
            body["system_fingerprint"] = fingerprint.as_str().into();
        }
        body
    }
}
