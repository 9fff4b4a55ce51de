//! Greedy answers: many prompts side by side, each until it says where to stop.

use relufy_data::Tokenizer;
use relufy_model::{Listener, Room, Tap, generate_batch};

use super::Session;
use crate::activity::{Activity, RowTap};
use crate::{Error, Result};

/// Prompts side by side.
const SLOTS: usize = 32;

/// What the model continues.
pub(super) struct Prompt<'a> {
    pub(super) request: usize,
    pub(super) ids: Vec<u32>,
    pub(super) until: &'a [String],
    pub(super) max: usize,
}

impl Session<'_> {
    /// Continues prompts; `each` hears of each request's text as it is done, with the
    /// activity of all tokens that entered the model for it.
    pub(super) fn generate(
        &self,
        prompts: &[Prompt<'_>],
        each: &mut dyn FnMut(usize, String, &Activity) -> Result<()>,
    ) -> Result<()> {
        let layers = self.decoder.spec().layers.len();
        let mut answers = Answers {
            tokenizer: self.tokenizer,
            prompts,
            tap: RowTap::new(layers, prompts.len()),
            each,
        };
        let given: Vec<relufy_model::Prompt<'_>> = prompts
            .iter()
            .map(|prompt| relufy_model::Prompt { ids: &prompt.ids, max_new: prompt.max })
            .collect();
        let room = Room { slots: SLOTS, tokens: self.tokens_per_batch };
        generate_batch(self.decoder, &given, self.tokenizer.eos_ids(), room, &mut answers)
    }
}

/// Answers on their way.
struct Answers<'a, 'e> {
    tokenizer: &'a Tokenizer,
    prompts: &'a [Prompt<'a>],
    tap: RowTap,
    each: &'e mut dyn FnMut(usize, String, &Activity) -> Result<()>,
}

impl Listener for Answers<'_, '_> {
    type Error = Error;

    fn pass(&mut self, parts: &[(usize, usize)]) {
        self.tap.begin(parts.iter().copied());
    }

    fn tap(&mut self) -> &mut dyn Tap {
        &mut self.tap
    }

    fn stop(&mut self, prompt: usize, new: &[u32]) -> bool {
        let until = self.prompts[prompt].until;
        // A stop of n bytes ends in the last n tokens; one more brings its leading blank.
        let reach = until.iter().map(String::len).max().unwrap_or(0) + 1;
        let end = &new[new.len().saturating_sub(reach)..];
        // What cannot be decoded is reported when the answer is done.
        let end = self.tokenizer.decode(end, true).unwrap_or_default();
        until.iter().any(|stop| !stop.is_empty() && end.contains(stop.as_str()))
    }

    fn done(&mut self, prompt: usize, new: Vec<u32>) -> Result<()> {
        let text = self.tokenizer.decode(&new, true)?;
        let Prompt { request, until, .. } = &self.prompts[prompt];
        (self.each)(*request, cut(&text, until).to_owned(), self.tap.of(prompt))
    }
}

/// The text in front of each stop in turn.
fn cut<'a>(text: &'a str, until: &[String]) -> &'a str {
    until
        .iter()
        .filter(|stop| !stop.is_empty())
        .fold(text, |text, stop| text.split_once(stop.as_str()).map_or(text, |(before, _)| before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_in_front_of_the_first_stop() {
        let until = ["\n", ".", ","].map(str::to_owned);
        assert_eq!(cut(" Paris, France.\nQ", &until), " Paris");
        assert_eq!(cut("no stop", &until), "no stop");
        assert_eq!(cut(".", &until), "");
    }
}
