//! What the handlers know, and how prompts become token ids.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use relufy_data::Tokenizer;
use relufy_data::corpus::ChatTemplate;
use serde_json::{Value, json};

use super::job::{Job, Prompt};
use super::queue::Queue;
use super::refusal::Refusal;
use super::request::Input;

/// What the handlers know.
pub struct App {
    /// What the model is called here.
    pub name: String,
    /// Seconds since 1970 at which the server was started.
    pub created: u64,
    pub tokenizer: Arc<Tokenizer>,
    /// Rows of the embedding: ids are below.
    pub vocab: usize,
    pub max_positions: usize,
    /// In what way answers are not exactly the model's, where they are not.
    pub inexact: Option<String>,
    /// How messages become text, where the server was told.
    pub template: Option<ChatTemplate>,
    /// Hash of the key that clients need.
    pub key: Option<blake3::Hash>,
    /// For a request, its wait included.
    pub timeout: Duration,
    pub queue: Arc<Queue<Job>>,
}

impl App {
    /// The model as `/v1/models` shows it.
    pub fn card(&self) -> Value {
        let mut card = json!({"id": self.name, "object": "model", "created": self.created,
            "owned_by": "relufy", "max_model_len": self.max_positions});
        if let Some(inexact) = &self.inexact {
            card["inexact"] = inexact.as_str().into();
        }
        card
    }

    /// Token ids of what is asked, with the room that each leaves.
    ///
    /// # Errors
    /// Prompts that the model cannot take; a chat where there is no template.
    pub fn prompts(&self, input: Input, max_new: Option<usize>) -> Result<Vec<Prompt>, Refusal> {
        let encode = |field: &str, text: &str| {
            let ids = self.tokenizer.encode(text, true);
            ids.map_err(|error| Refusal::field(field, error.to_string()))
        };
        let (field, lists, spaces) = match input {
            Input::Texts(texts) => {
                let lists =
                    texts.iter().map(|text| encode("prompt", text)).collect::<Result<_, _>>()?;
                ("prompt", lists, 0)
            }
            Input::Ids(lists) => ("prompt", lists, 0),
            Input::Messages(messages) => {
                let text = self.conversation(&messages)?;
                let trimmed = text.trim_end_matches(' ');
                ("messages", vec![encode("messages", trimmed)?], text.len() - trimmed.len())
            }
        };
        lists.into_iter().map(|ids| self.prompt(field, ids, max_new, spaces)).collect()
    }

    fn conversation(&self, messages: &Value) -> Result<String, Refusal> {
        let template = self.template.as_ref().ok_or_else(|| {
            let message = "this server has no chat template: start it with `--chat-template FILE` \
                (Jinja templates of a model's folder are not evaluated), or use /v1/completions";
            Refusal::new(StatusCode::BAD_REQUEST, "no_chat_template", message)
        })?;
        let eos = self.tokenizer.eos_id().and_then(|id| self.tokenizer.token(id));
        template
            .prompt(messages, &eos.unwrap_or_default())
            .map_err(|why| Refusal::field("messages", why))
    }

    fn prompt(
        &self,
        field: &str,
        mut ids: Vec<u32>,
        max_new: Option<usize>,
        spaces: usize,
    ) -> Result<Prompt, Refusal> {
        if ids.is_empty() {
            // An empty prompt is the beginning of a text.
            ids.extend(self.tokenizer.prefix_token());
        }
        let vocab = self.vocab.min(self.tokenizer.vocab_size());
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            let message = format!("`{field}`: token {id} is not in the vocabulary of {vocab}");
            return Err(Refusal::field(field, message));
        }
        let (tokens, max) = (ids.len(), self.max_positions);
        if tokens == 0 {
            return Err(Refusal::field(field, format!("`{field}`: there is nothing to continue")));
        }
        if tokens >= max {
            let message = format!(
                "`{field}` has {tokens} tokens; the model has {max} positions, and an answer needs at least one"
            );
            let code = Some("context_length_exceeded");
            return Err(Refusal { code, ..Refusal::field(field, message) });
        }
        let room = max - tokens;
        Ok(Prompt { ids, max_new: max_new.unwrap_or(room).min(room), spaces })
    }
}
