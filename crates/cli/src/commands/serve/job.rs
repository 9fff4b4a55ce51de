//! A request on its way through the worker.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::refusal::Refusal;
use crate::sampling::Draw;

/// A request that can be worked at.
pub struct Job {
    pub prompts: Vec<Prompt>,
    pub draw: Draw,
    pub stop: Vec<String>,
    /// After this nobody waits for it.
    pub deadline: Instant,
    /// Whoever asked; closed when they have gone.
    pub events: UnboundedSender<Event>,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    pub max_new: usize,
    /// So many spaces at the start of the text belong to the prompt, which ends in front of
    /// them: a token's space stands before its word.
    pub spaces: usize,
}

/// What becomes of a job.
#[derive(Debug)]
pub enum Event {
    /// More text of a prompt: whole characters.
    Text(usize, String),
    /// A prompt's text is complete.
    Done(usize, Finish, usize),
    /// Nothing more comes.
    Failed(Refusal),
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At the model's end token, or a stop string.
    Stop,
    /// At so many tokens as were asked, or the model's last position.
    Length,
}

impl Finish {
    /// As OpenAI writes it.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

impl Job {
    /// Whether nobody waits for it any more.
    pub fn given_up(&self) -> bool {
        self.events.is_closed()
    }
}
