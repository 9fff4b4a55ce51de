//! One text on its way: from the logits after its last token to the next token, and to what is sent.

use std::sync::Arc;

use relufy_data::{DecodeStream, Tokenizer};

use super::job::{Event, Finish, Job, Prompt};
use super::refusal::Refusal;
use super::stops::Stops;
use crate::sampling::{Draw, Sampler};

/// The text behind a prompt.
pub struct Lane<'a> {
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    stream: DecodeStream<'a>,
    text: Text,
    /// How many of the prompt's tokens the engine has.
    taken: usize,
    /// How many tokens there are behind them.
    new: usize,
}

/// Why a text goes on no longer.
pub enum Ending {
    /// At the model's end token, or with as many tokens as were asked.
    Complete(Finish),
    /// In front of a stop string.
    Stopped,
    /// It is not complete, and this is why.
    Cut(Refusal),
    /// Nobody reads it any more.
    Unread,
}

impl<'a> Lane<'a> {
    /// Begins the text of one of a job's prompts.
    ///
    /// # Errors
    /// A prompt with tokens that are not in the vocabulary.
    pub fn new(tokenizer: &'a Tokenizer, job: Arc<Job>, index: usize) -> anyhow::Result<Lane<'a>> {
        let prompt = &job.prompts[index];
        let seed = job.draw.seed.wrapping_add(index as u64);
        let sampler = Sampler::new(&Draw { seed, ..job.draw });
        let stream = tokenizer.stream_after(&prompt.ids, true)?;
        let (stops, spaces) = (Stops::new(job.stop.clone()), prompt.spaces);
        let text = Text { job, index, stops, spaces };
        Ok(Lane { tokenizer, sampler, stream, text, taken: 0, new: 0 })
    }

    /// Whose text it is.
    pub fn job(&self) -> &Arc<Job> {
        &self.text.job
    }

    /// What of the prompt the engine does not have yet.
    pub fn rest(&self) -> &[u32] {
        &self.text.prompt().ids[self.taken..]
    }

    /// The engine has taken so many more of the prompt's tokens.
    pub fn took(&mut self, tokens: usize) {
        self.taken += tokens;
    }

    /// The token after `logits`, of whose text is sent what can be; or why the engine is not to have
    /// it. `keep_on` says whether a text that is not complete may go on.
    ///
    /// # Errors
    /// Logits that are no numbers; a token without text.
    pub fn next(
        &mut self,
        logits: &[f32],
        keep_on: impl FnOnce(&Job) -> Result<(), Ending>,
    ) -> anyhow::Result<Result<u32, Ending>> {
        // Rows of the embedding past the last token stand for no text.
        let vocab = self.tokenizer.vocab_size().min(logits.len());
        let token = self.sampler.pick(&logits[..vocab])?;
        if self.tokenizer.eos_ids().contains(&token) {
            return Ok(Err(Ending::Complete(Finish::Stop)));
        }
        self.new += 1;
        let piece = self.stream.push(token)?.unwrap_or_default();
        if self.text.push(&piece) {
            return Ok(Err(Ending::Stopped));
        }
        if self.new >= self.text.prompt().max_new {
            return Ok(Err(Ending::Complete(Finish::Length)));
        }
        Ok(keep_on(self.job()).map(|()| token))
    }

    /// Sends what was held back of a complete text; returns what is to be sent last, if anything.
    ///
    /// # Errors
    /// Tokens without text.
    pub fn end(self, ending: Ending) -> anyhow::Result<Option<Event>> {
        let Lane { stream, mut text, new, .. } = self;
        let finish = match ending {
            Ending::Unread => return Ok(None),
            Ending::Cut(refusal) => return Ok(Some(Event::Failed(refusal))),
            Ending::Stopped => Finish::Stop,
            Ending::Complete(finish) => {
                // A stop string may end there as well.
                if text.push(&stream.finish()?.unwrap_or_default()) {
                    Finish::Stop
                } else {
                    text.finish();
                    finish
                }
            }
        };
        Ok(Some(Event::Done(text.index, finish, new)))
    }
}

/// A prompt's text on its way out.
struct Text {
    job: Arc<Job>,
    index: usize,
    stops: Stops,
    /// As in [`Prompt`].
    spaces: usize,
}

impl Text {
    fn prompt(&self) -> &Prompt {
        &self.job.prompts[self.index]
    }

    /// Sends what can be sent; whether a stop string ended the text.
    fn push(&mut self, piece: &str) -> bool {
        let leading = piece.bytes().take_while(|byte| *byte == b' ').count().min(self.spaces);
        let piece = &piece[leading..];
        self.spaces = if piece.is_empty() { self.spaces - leading } else { 0 };
        let (text, ended) = self.stops.push(piece);
        self.send(text);
        ended
    }

    /// Sends what was held back.
    fn finish(&mut self) {
        let rest = self.stops.finish();
        self.send(rest);
    }

    fn send(&self, text: String) {
        if !text.is_empty() {
            // Who has gone is noticed before the next token.
            let _gone = self.job.events.send(Event::Text(self.index, text));
        }
    }
}
