//! Decoding token by token with a cache of keys and values.

use relufy_ops::{buffer, rows};

use crate::{Decoder, Error, KvCache, NoTap, Result};

/// Continues `prompt` by at most `max_new` tokens. `sample` picks a token from the logits
/// `[vocab]`; `on_token` sees each token as it comes and ends the generation by returning
/// `false`. A token of `stop` ends it too and is not part of what is returned.
///
/// Generation ends quietly where the model has no further position.
///
/// # Errors
/// An empty prompt, one longer than the model's positions, and what `sample` returns.
pub fn generate<E: From<Error>>(
    decoder: &Decoder,
    prompt: &[u32],
    max_new: usize,
    stop: &[u32],
    mut sample: impl FnMut(&[f32]) -> std::result::Result<u32, E>,
    mut on_token: impl FnMut(u32) -> bool,
) -> std::result::Result<Vec<u32>, E> {
    let max = decoder.spec().max_positions;
    if prompt.len() > max {
        return Err(Error::SequenceTooLong { len: prompt.len(), max }.into());
    }
    let room = max_new.min(max - prompt.len());
    let mut cache = KvCache::new(decoder, 1, prompt.len() + room)?;
    let mut logits = next_logits(decoder, &mut cache, prompt)?;
    let mut made = Vec::new();
    while made.len() < room {
        let token = sample(&logits)?;
        if stop.contains(&token) {
            break;
        }
        made.push(token);
        if !on_token(token) || made.len() == room {
            break;
        }
        logits = next_logits(decoder, &mut cache, &[token])?;
    }
    Ok(made)
}

/// Appends tokens to a cache's first sequence; the logits `[vocab]` after the last.
///
/// # Errors
/// No tokens; more than the cache has room for.
pub fn next_logits(decoder: &Decoder, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
    let Some(last) = ids.len().checked_sub(1) else {
        return Err(Error::Invalid("an empty prompt: nothing to continue".to_owned()));
    };
    let tokens = cache.extend(&[(0, ids)])?;
    let hidden = decoder.hidden_cached(&tokens, cache, &mut NoTap)?;
    let last = rows::gather(&hidden, &[last])?;
    Ok(buffer::to_host(&decoder.logits(&last)?)?)
}
