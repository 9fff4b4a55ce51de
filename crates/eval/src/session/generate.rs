//! Greedy answers: many prompts side by side, each until it says where to stop.

use super::Session;
use crate::Result;
use crate::activity::Activity;

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
        prompts: Vec<Prompt<'_>>,
        each: &mut dyn FnMut(usize, String, &Activity) -> Result<()>,
    ) -> Result<()> {
        let stop_tokens = self.tokenizer.eos_ids();
        for prompt in prompts {
            let argmax = |logits: &[f32]| -> Result<u32> {
                Ok(crate::metrics::first_argmax(logits.iter().map(|x| f64::from(*x))) as u32)
            };
            let mut ids: Vec<u32> = Vec::new();
            let on_token = |token| {
                ids.push(token);
                let text = self.tokenizer.decode(&ids, true).unwrap_or_default();
                !prompt.until.iter().any(|stop| text.contains(stop.as_str()))
            };
            let made = relufy_model::generate(
                self.decoder, &prompt.ids, prompt.max, stop_tokens, argmax, on_token,
            )?;
            let text = cut(&self.tokenizer.decode(&made, true)?, prompt.until).to_owned();
            each(prompt.request, text, &self.no_activity())?;
        }
        Ok(())
    }
}

/// The text in front of the first stop.
fn cut<'a>(text: &'a str, until: &[String]) -> &'a str {
    until
        .iter()
        .filter(|stop| !stop.is_empty())
        .fold(text, |text, stop| text.split_once(stop.as_str()).map_or(text, |(before, _)| before))
}
