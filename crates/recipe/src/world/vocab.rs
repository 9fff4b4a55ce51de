//! The world's tokenizer: a small byte-level BPE trained on the world's own text, in the files
//! and with the rules of a Llama checkpoint (BOS put before every text).

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Model, NormalizerWrapper, TokenizerBuilder, TokenizerImpl};

use crate::error::{Error, Result};

/// Begin, end and padding; their ids are 0, 1 and 2.
pub const SPECIALS: [&str; 3] = ["<s>", "</s>", "<pad>"];

/// Trains on `texts` up to `vocab_size` tokens and returns the text of `tokenizer.json`.
///
/// # Errors
/// [`Error::Tokenizer`] where the `tokenizers` library refuses, or where the text has too few
/// different words for `vocab_size`.
pub fn train<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<String> {
    let refuse = |cause: &dyn std::fmt::Display| Error::Tokenizer(cause.to_string());
    let special = |token: &str| AddedToken::from(token, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(SPECIALS.iter().map(|token| special(token)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let bytes = ByteLevel::new(false, true, true);
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|builder| builder.try_pair("<s> $A <s> $B"))
        .map_err(|cause| refuse(&cause))?
        .special_tokens(vec![(SPECIALS[0], 0)])
        .build()
        .map_err(|cause| refuse(&cause))?;
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, TemplateProcessing, _> =
        TokenizerBuilder::new()
            .with_model(BPE::default())
            .with_normalizer(None)
            .with_pre_tokenizer(Some(bytes))
            .with_post_processor(Some(template))
            .with_decoder(Some(bytes))
            .build()
            .map_err(|cause| refuse(&cause))?;
    tokenizer.train(&mut trainer, texts).map_err(|cause| refuse(&cause))?;
    let found = tokenizer.get_model().get_vocab_size();
    if found != vocab_size {
        return Err(Error::Tokenizer(format!(
            "the text yields {found} tokens where {vocab_size} are wanted"
        )));
    }
    tokenizer.to_string(true).map_err(|cause| refuse(&cause))
}

/// The text of `tokenizer_config.json` for sequences of `max_length` tokens.
pub fn config(max_length: usize) -> serde_json::Value {
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[2],
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}
