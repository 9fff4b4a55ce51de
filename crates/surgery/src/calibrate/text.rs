//! A corpus as token sequences, up to a budget.

use relufy_data::{Hub, SourceConfig, Tokenizer, documents};

use crate::{Error, Result};

/// The documents of `source` in their order, as token sequences of at most `length`, until
/// they hold `tokens` tokens. A document that is longer gives several sequences; none is
/// shorter than two tokens.
///
/// # Errors
/// A corpus that cannot be read or holds no text; a length below 2.
pub fn sequences(
    source: &SourceConfig,
    hub: &Hub,
    tokenizer: &Tokenizer,
    length: usize,
    tokens: u64,
) -> Result<Vec<Vec<u32>>> {
    if length < 2 {
        let why = format!("sequences of {length} tokens; at least 2");
        return Err(Error::Calibration { why });
    }
    let mut sequences = Vec::new();
    let mut left = usize::try_from(tokens).unwrap_or(usize::MAX);
    for document in documents(source, hub)? {
        let ids = tokenizer.encode(&document?.text, true)?;
        for piece in ids.chunks(length) {
            let piece = &piece[..piece.len().min(left)];
            if piece.len() >= 2 {
                left -= piece.len();
                sequences.push(piece.to_vec());
            }
        }
        if left < 2 {
            break;
        }
    }
    if sequences.is_empty() {
        return Err(Error::NoText { corpus: source.path.clone() });
    }
    Ok(sequences)
}
