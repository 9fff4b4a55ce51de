//! Greedy continuations of many prompts, several side by side: what an evaluation asks.
//!
//! A sequence that ends gives its place in the cache to the next prompt at once. New prompts
//! enter in the same pass as the others' single steps, so that every matrix is read for all.

use relufy_ops::rows;

use crate::{Decoder, Error, KvCache, Result, Tap};

/// What to continue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt<'a> {
    /// The tokens to continue.
    pub ids: &'a [u32],
    /// At most so many new ones.
    pub max_new: usize,
}

/// How much runs at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Sequences side by side.
    pub slots: usize,
    /// Tokens of a pass, unless a single prompt is longer.
    pub tokens: usize,
}

/// Whoever asked for the continuations. Prompts go by their index.
pub trait Listener {
    /// What can go wrong.
    type Error: From<Error>;

    /// A pass begins over (prompt, number of its tokens) in the order of the pass's rows.
    fn pass(&mut self, parts: &[(usize, usize)]) {
        let _ = parts;
    }

    /// Who sees the activations: of every prompt token once, and of every new one that is
    /// itself continued.
    fn tap(&mut self) -> &mut dyn Tap;

    /// A prompt got one more token: is it complete?
    fn stop(&mut self, prompt: usize, new: &[u32]) -> bool;

    /// A prompt's continuation, complete.
    ///
    /// # Errors
    /// Whatever goes wrong with it ends the generation.
    fn done(&mut self, prompt: usize, new: Vec<u32>) -> std::result::Result<(), Self::Error>;
}

/// Continues each prompt greedily: by the first of the largest logits. A continuation ends with
/// `max_new` tokens, when the listener says so, or in front of a token of `stop_tokens`.
///
/// # Errors
/// An empty prompt or one whose continuation might not fit the model's positions (before any
/// work), no slots, logits that are no numbers, and what the listener returns.
pub fn generate_batch<L: Listener>(
    decoder: &Decoder,
    prompts: &[Prompt<'_>],
    stop_tokens: &[u32],
    room: Room,
    listener: &mut L,
) -> std::result::Result<(), L::Error> {
    let longest = check(decoder, prompts, room)?;
    let mut queue = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        match prompt.max_new {
            0 => listener.done(index, Vec::new())?,
            _ => queue.push(index),
        }
    }
    let slots = room.slots.min(queue.len());
    let mut cache = KvCache::new(decoder, slots, longest)?;
    let mut queue = queue.into_iter().peekable();
    let mut active: Vec<Option<Active>> = (0..slots).map(|_| None).collect();
    loop {
        let mut tokens = active.iter().flatten().count();
        for (slot, place) in active.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            let fits =
                |next: &usize| tokens == 0 || tokens + prompts[*next].ids.len() <= room.tokens;
            let Some(prompt) = queue.next_if(fits) else { break };
            tokens += prompts[prompt].ids.len();
            cache.truncate(slot, 0);
            *place = Some(Active { prompt, new: Vec::new() });
        }
        if active.iter().all(Option::is_none) {
            return Ok(());
        }
        let greedy = pass(decoder, prompts, &active, &mut cache, listener)?;
        let running = active.iter_mut().filter(|place| place.is_some());
        for (place, token) in running.zip(greedy) {
            let Some(Active { prompt, new }) = place else { continue };
            let token = token.ok_or_else(|| {
                let place = prompts[*prompt].ids.len() + new.len();
                Error::Invalid(format!("prompt {prompt}: a logit after token {place} is NaN"))
            })?;
            let stopped = stop_tokens.contains(&token);
            if !stopped {
                new.push(token);
            }
            if stopped || listener.stop(*prompt, new) || new.len() == prompts[*prompt].max_new {
                listener.done(*prompt, std::mem::take(new))?;
                *place = None;
            }
        }
    }
}

/// A prompt at work in a slot.
struct Active {
    prompt: usize,
    /// What was made so far; of nothing the prompt itself enters next, else the last token.
    new: Vec<u32>,
}

/// One pass over what each active slot has to enter; the greedy token after each.
fn pass<L: Listener>(
    decoder: &Decoder,
    prompts: &[Prompt<'_>],
    active: &[Option<Active>],
    cache: &mut KvCache,
    listener: &mut L,
) -> Result<Vec<Option<u32>>> {
    let (mut entering, mut parts, mut last_rows, mut end) = (vec![], vec![], vec![], 0);
    for (slot, active) in active.iter().enumerate() {
        let Some(Active { prompt, new }) = active else { continue };
        let ids = new.last().map_or(prompts[*prompt].ids, std::slice::from_ref);
        end += ids.len();
        entering.push((slot, ids));
        parts.push((*prompt, ids.len()));
        last_rows.push(end - 1);
    }
    let tokens = cache.extend(&entering)?;
    listener.pass(&parts);
    let hidden = decoder.hidden_cached(&tokens, cache, listener.tap())?;
    decoder.greedy(&rows::gather(&hidden, &last_rows)?)
}

/// Refuses what cannot be continued to its end; gives the longest sequence that may come.
fn check(decoder: &Decoder, prompts: &[Prompt<'_>], room: Room) -> Result<usize> {
    if room.slots == 0 {
        return Err(Error::Invalid("generation without slots".to_owned()));
    }
    let max = decoder.spec().max_positions;
    let mut longest = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.ids.is_empty() {
            return Err(Error::Invalid(format!("prompt {index} is empty: nothing to continue")));
        }
        let len = prompt.ids.len().saturating_add(prompt.max_new);
        if len > max {
            return Err(Error::Invalid(format!(
                "prompt {index}: {} tokens leave no room for {} more in the model's {max} positions",
                prompt.ids.len(),
                prompt.max_new,
            )));
        }
        longest = longest.max(len);
    }
    Ok(longest)
}
