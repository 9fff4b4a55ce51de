//! Text from ids that come one by one.
//!
//! A token may be half a character, and some decoders drop a space at the start of what
//! they see. So each step decodes a short window that begins with tokens already shown,
//! and gives out what is new once it ends in a whole character.

use super::Tokenizer;
use crate::Result;

/// Decodes ids as they come; what it gives out, put together, is the decoded whole.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// How many tokens of the window have been given out.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        DecodeStream { tokenizer, skip_special, window: Vec::new(), shown: 0 }
    }

    /// Takes `ids` as shown: what comes next continues their text.
    pub(super) fn after(mut self, ids: &[u32]) -> Result<Self> {
        // Behind half a character nothing could be told apart from its missing half.
        if !self.tokenizer.decode(ids, self.skip_special)?.ends_with('\u{FFFD}') {
            self.window = ids.to_vec();
            self.shown = ids.len();
        }
        Ok(self)
    }

    /// Takes the next id; gives the text that it completes, if it completes any.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] for an id past the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        // Refused before it enters the window, so that the stream stays usable.
        self.tokenizer.decode(&[id], self.skip_special)?;
        self.window.push(id);
        self.emit(false)
    }

    /// The rest: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`DecodeStream::push`].
    pub fn finish(mut self) -> Result<Option<String>> {
        self.emit(true)
    }

    fn emit(&mut self, at_once: bool) -> Result<Option<String>> {
        let before = self.tokenizer.decode(&self.window[..self.shown], self.skip_special)?;
        let now = self.tokenizer.decode(&self.window, self.skip_special)?;
        // Byte fallback turns a whole run of bytes into U+FFFD while its end is missing.
        let new = match now.strip_prefix(before.as_str()) {
            Some(new) => new.to_owned(),
            None if at_once => {
                self.tokenizer.decode(&self.window[self.shown..], self.skip_special)?
            }
            None => return Ok(None),
        };
        if new.is_empty() || (new.ends_with('\u{FFFD}') && !at_once) {
            return Ok(None);
        }
        // What was new is the next step's context; what stood before it is not needed.
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        Ok(Some(new))
    }
}
