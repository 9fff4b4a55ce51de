//! What all families' `config.json` have in common: keys that say nothing about the
//! decoder, and names of activations.

use crate::{Activation, Error, Result, validate::MAX_LAYERS};

use super::keys::Keys;

/// Says nothing about the decoder: housekeeping, tokens, and what transformers once
/// wrote of its generation settings.
const IGNORED: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "custom_pipelines",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Consumes the keys that every family may carry.
pub(super) fn housekeeping(keys: &mut Keys<'_>) -> Result<()> {
    if keys.take("quantization_config").is_some() {
        return Err(unsupported("quantized weights (`quantization_config`)"));
    }
    keys.ignore(IGNORED);
    keys.ignore_numbers(&["attention_dropout", "hidden_dropout", "classifier_dropout"])?;
    for flag in ["add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"] {
        keys.only(flag, false)?;
    }
    // A decoder without a cross-attention is the same whatever this says.
    keys.optional::<bool>("is_decoder")?;
    keys.only("chunk_size_feed_forward", 0)?;
    match keys.take("pruned_heads") {
        Some(pruned) if pruned.as_object().is_none_or(|heads| !heads.is_empty()) => {
            Err(unsupported("pruned attention heads (`pruned_heads`)"))
        }
        _ => Ok(()),
    }
}

/// Something that is known by name and not supported.
pub(super) fn unsupported(what: impl Into<String>) -> Error {
    Error::Unsupported { what: what.into() }
}

/// Reads the activation under `key`, by its name in transformers' `ACT2FN`.
pub(super) fn activation(keys: &mut Keys<'_>, key: &str, default: &str) -> Result<Activation> {
    let name = keys.or(key, default.to_owned())?;
    Activation::from_hf_name(&name)
        .ok_or_else(|| unsupported(format!("activation `{name}` (config key `{key}`)")))
}

/// `whole / part`, where that has no rest.
pub(super) fn divide(keys: &Keys<'_>, key: &str, whole: usize, part: usize) -> Result<usize> {
    match whole.checked_div(part) {
        Some(quotient) if quotient * part == whole => Ok(quotient),
        _ => Err(keys.bad(key, &format!("a divisor of {whole}"), part)),
    }
}

/// Consumes the number of layers, small enough to be listed.
pub(super) fn layer_count(keys: &mut Keys<'_>, names: &[&str], default: usize) -> Result<usize> {
    let layers = keys.size_or(names, default)?;
    if layers > MAX_LAYERS {
        let name = names.first().copied().unwrap_or_default();
        return Err(keys.bad(name, &format!("1 to {MAX_LAYERS}"), layers));
    }
    Ok(layers)
}

/// The usual factor of attention scores.
pub(super) fn attention_scale(head_dim: usize) -> f64 {
    1.0 / (head_dim as f64).sqrt()
}
