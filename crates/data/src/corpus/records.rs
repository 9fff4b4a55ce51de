//! Documents from records, whatever file format these stood in.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{ChatTemplate, Document, Layout, SourceConfig, record_error};
use crate::Result;

impl SourceConfig {
    /// The fields that may be read of a record.
    pub(super) fn columns(&self) -> Vec<&str> {
        match self.layout {
            Some(Layout::Text) => vec![self.text_field()],
            Some(Layout::Messages) => vec!["messages"],
            Some(Layout::PromptCompletion) => vec!["prompt", "completion"],
            None if self.text_field.is_some() => vec![self.text_field()],
            None => vec![self.text_field(), "messages", "prompt", "completion"],
        }
    }

    /// What a record is.
    fn layout_of(&self, record: &Map<String, Value>) -> Layout {
        self.layout.unwrap_or({
            if self.text_field.is_some() || record.contains_key(self.text_field()) {
                Layout::Text
            } else if record.contains_key("messages") {
                Layout::Messages
            } else if record.contains_key("prompt") {
                Layout::PromptCompletion
            } else {
                Layout::Text
            }
        })
    }
}

/// Turns an iterator of numbered records into one of documents.
pub(super) struct Records<I> {
    records: I,
    unit: &'static str,
    path: PathBuf,
    source: SourceConfig,
    chat: ChatTemplate,
    eos: String,
}

impl<I> Records<I> {
    pub(super) fn new(
        records: I,
        unit: &'static str,
        path: PathBuf,
        source: &SourceConfig,
        chat: &ChatTemplate,
        eos: &str,
    ) -> Self {
        Records {
            records,
            unit,
            path,
            source: source.clone(),
            chat: chat.clone(),
            eos: eos.to_owned(),
        }
    }

    fn document(&self, mut record: Map<String, Value>) -> std::result::Result<Document, String> {
        match self.source.layout_of(&record) {
            Layout::Text => {
                let text = take_text(&mut record, self.source.text_field())?;
                Ok(Document { text, masked: Vec::new() })
            }
            Layout::Messages => {
                let messages =
                    record.get("messages").ok_or_else(|| missing(&record, "messages"))?;
                self.chat.render(messages, &self.eos)
            }
            Layout::PromptCompletion => {
                let mut text = take_text(&mut record, "prompt")?;
                let prompt = text.len();
                text.push_str(&take_text(&mut record, "completion")?);
                Ok(Document { text, masked: std::iter::once(0..prompt).collect() })
            }
        }
    }
}

impl<I: Iterator<Item = Result<(u64, Map<String, Value>)>>> Iterator for Records<I> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        let (number, record) = match self.records.next()? {
            Ok(record) => record,
            Err(error) => return Some(Err(error)),
        };
        Some(self.document(record).map_err(|why| record_error(&self.path, self.unit, number, why)))
    }
}

fn take_text(record: &mut Map<String, Value>, field: &str) -> std::result::Result<String, String> {
    match record.get_mut(field) {
        Some(Value::String(text)) => Ok(std::mem::take(text)),
        Some(other) => {
            let kind = match other {
                Value::Null => "null",
                Value::Bool(_) => "a boolean",
                Value::Number(_) => "a number",
                Value::Array(_) => "a list",
                _ => "an object",
            };
            Err(format!("field `{field}` should be a string, but is {kind}"))
        }
        None => Err(missing(record, field)),
    }
}

fn missing(record: &Map<String, Value>, field: &str) -> String {
    let found: Vec<_> = record.keys().map(String::as_str).collect();
    format!("there is no field `{field}`; the fields are: {}", found.join(", "))
}
