//! Conversations as text, with everything but the assistant's words masked.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Document;

/// How messages become text: one pattern a role, in which `{content}` stands for the
/// message and `{eos}` for the tokenizer's EOS.
///
/// Of the assistant's pattern, what stands before `{content}` is prompt; the rest is learnt.
/// The default reads
///
/// ```text
/// You are helpful.
///
/// User: Hello
/// Assistant: Good morning.</s>
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChatTemplate {
    /// For `system` and `developer`.
    pub system: String,
    /// For `user`.
    pub user: String,
    /// For `assistant`.
    pub assistant: String,
}

impl Default for ChatTemplate {
    fn default() -> Self {
        ChatTemplate {
            system: "{content}\n\n".to_owned(),
            user: "User: {content}\n".to_owned(),
            assistant: "Assistant: {content}{eos}\n".to_owned(),
        }
    }
}

impl ChatTemplate {
    /// A conversation as a document.
    ///
    /// # Errors
    /// Says what is wrong with the messages.
    pub(super) fn render(&self, messages: &Value, eos: &str) -> Result<Document, String> {
        let messages = messages.as_array().ok_or("`messages` is not a list")?;
        let mut document = Document::default();
        let mut learnt_to = 0;
        for (i, message) in messages.iter().enumerate() {
            let Turn { role, content, before, after } = self.turn(i, message)?;
            document.text.push_str(&before.replace("{eos}", eos));
            if role == "assistant" {
                document.masked.push(learnt_to..document.text.len());
            }
            document.text.push_str(content);
            document.text.push_str(&after.replace("{eos}", eos));
            if role == "assistant" {
                learnt_to = document.text.len();
            }
        }
        if learnt_to == 0 {
            return Err("no message of the assistant: nothing to learn".to_owned());
        }
        // White space behind the last turn's EOS would hide that the text has ended.
        let end = document.text.trim_end().len();
        if !eos.is_empty()
            && learnt_to == document.text.len()
            && document.text[..end].ends_with(eos)
        {
            document.text.truncate(end);
        } else if learnt_to < document.text.len() {
            document.masked.push(learnt_to..document.text.len());
        }
        Ok(document)
    }

    /// A conversation up to where the assistant speaks next: what a model continues.
    ///
    /// # Errors
    /// Says what is wrong with the messages.
    pub fn prompt(&self, messages: &Value, eos: &str) -> Result<String, String> {
        let messages = messages.as_array().ok_or("`messages` is not a list")?;
        if messages.is_empty() {
            return Err("`messages` is empty".to_owned());
        }
        let mut text = String::new();
        for (i, message) in messages.iter().enumerate() {
            let Turn { content, before, after, .. } = self.turn(i, message)?;
            text.push_str(&before.replace("{eos}", eos));
            text.push_str(content);
            text.push_str(&after.replace("{eos}", eos));
        }
        let (before, _) = self.pattern("assistant")?;
        text.push_str(&before.replace("{eos}", eos));
        Ok(text)
    }

    fn turn<'a>(&'a self, i: usize, message: &'a Value) -> Result<Turn<'a>, String> {
        let field = |key: &str| {
            message
                .get(key)
                .and_then(Value::as_str)
                .ok_or_else(|| format!("message {i}: `{key}` is missing or not a string"))
        };
        let (role, content) = (field("role")?, field("content")?);
        let (before, after) = self.pattern(role).map_err(|why| format!("message {i}: {why}"))?;
        Ok(Turn { role, content, before, after })
    }

    /// What stands before and after a role's words.
    fn pattern(&self, role: &str) -> Result<(&str, &str), String> {
        let pattern = match role {
            "system" | "developer" => &self.system,
            "user" => &self.user,
            "assistant" => &self.assistant,
            _ => return Err(format!("no pattern for role `{role}`")),
        };
        pattern
            .split_once("{content}")
            .ok_or_else(|| format!("the chat template of `{role}` has no {{content}}"))
    }
}

/// A message and what its role puts around it.
struct Turn<'a> {
    role: &'a str,
    content: &'a str,
    before: &'a str,
    after: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_assistant_is_learnt() {
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Good bye"},
        ]);
        let document = ChatTemplate::default().render(&messages, "</s>").unwrap();
        assert_eq!(
            document.text,
            "Be brief.\n\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: Good bye</s>"
        );
        let mut learnt = document.text.clone();
        for range in document.masked.iter().rev() {
            learnt.replace_range(range.clone(), "|");
        }
        assert_eq!(learnt, "|Hello</s>\n|Good bye</s>");
    }

    #[test]
    fn a_prompt_ends_where_the_assistant_speaks() {
        let template = ChatTemplate::default();
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ]);
        assert_eq!(
            template.prompt(&messages, "</s>").unwrap(),
            "Be brief.\n\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: "
        );
        for (bad, why) in [
            (json!("x"), "not a list"),
            (json!([]), "is empty"),
            (json!([{"role": "owl", "content": ""}]), "message 0: no pattern for role `owl`"),
        ] {
            let error = template.prompt(&bad, "").unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_trailing_question_is_masked_and_bad_messages_are_named() {
        let template = ChatTemplate::default();
        let messages = json!([
            {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}
        ]);
        let document = template.render(&messages, "").unwrap();
        assert_eq!(document.masked, [0..11, 13..21]);
        for (bad, why) in [
            (json!("x"), "not a list"),
            (json!([]), "nothing to learn"),
            (json!([{"role": "user"}]), "`content` is missing"),
            (json!([{"role": "user", "content": 1}]), "not a string"),
            (json!([{"role": "owl", "content": ""}]), "role `owl`"),
        ] {
            let error = template.render(&bad, "").unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
