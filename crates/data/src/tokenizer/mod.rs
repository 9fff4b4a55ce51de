//! Text to ids and back, as transformers' fast tokenizers do it.
//!
//! `tokenizer.json` is the truth; `tokenizer_config.json` and its companions say which
//! tokens begin and end a text, and whether they are added (`rules`).

mod rules;
mod stream;

use std::path::Path;

use rayon::prelude::*;

pub use stream::DecodeStream;

use crate::{Error, Result};
use rules::Rules;

/// A tokenizer with its rules for BOS and EOS.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    rules: Rules,
    vocab_size: usize,
    fingerprint: String,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("rules", &self.rules)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer of a model's folder.
    ///
    /// # Errors
    /// [`Error::NoFastTokenizer`] where there is only a SentencePiece model or a word list,
    /// [`Error::MissingFile`] where there is nothing, [`Error::BadFile`] for a file that
    /// cannot be understood.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let others = ["tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"];
            return Err(match others.iter().find(|name| folder.join(name).is_file()) {
                Some(found) => Error::NoFastTokenizer {
                    folder: folder.to_path_buf(),
                    found: (*found).to_owned(),
                },
                None => Error::MissingFile {
                    folder: folder.to_path_buf(),
                    file: "tokenizer.json".to_owned(),
                },
            });
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::bad_file(&path, format!("is not a tokenizer: {e}")))?;
        // What a file says about cutting and padding is for its maker's batches, not for texts.
        inner.with_truncation(None).map_err(|e| Error::bad_file(&path, e))?;
        inner.with_padding(None);

        let rules = Rules::read(folder, &inner)?;
        rules.apply(&mut inner).map_err(|e| Error::bad_file(&path, e))?;
        let highest = inner.get_vocab(true).into_values().max();
        let vocab_size = highest.map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            return Err(Error::bad_file(&path, "holds no tokens"));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        hasher.update(rules.describe().as_bytes());
        let fingerprint = hasher.finalize().to_hex().to_string();
        Ok(Tokenizer { inner, rules, vocab_size, fingerprint })
    }

    /// The ids of a text; `add_special` adds BOS and EOS where the tokenizer's rules do.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the text cannot be encoded.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of each text, in their order; encoded in parallel.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], of the first text that fails.
    pub fn encode_batch(
        &self,
        texts: &[impl AsRef<str> + Sync],
        add_special: bool,
    ) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref(), add_special)).collect()
    }

    /// Ids with the byte range of the text that each stands for (empty for added tokens).
    pub(crate) fn encode_with_offsets(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<Vec<(u32, std::ops::Range<usize>)>> {
        let encoding = self.inner.encode(text, add_special).map_err(refused)?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// The text of ids; `skip_special` leaves BOS, EOS and their like out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an id past the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(Error::Tokenizer {
                why: format!("id {id} is past the vocabulary of {}", self.vocab_size),
            });
        }
        self.inner.decode(ids, skip_special).map_err(refused)
    }

    /// Decodes ids as they come.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// Decodes ids as they come behind `before`, of which nothing is given out again: a space
    /// between the two, which decoders drop at the start of a text, is kept.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an id past the vocabulary.
    pub fn stream_after(&self, before: &[u32], skip_special: bool) -> Result<DecodeStream<'_>> {
        self.stream(skip_special).after(before)
    }

    /// Begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.rules.bos
    }

    /// Ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.rules.eos.first().copied()
    }

    /// Every token that ends a generation: [`Tokenizer::eos_id`] first, then the others of
    /// `generation_config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.rules.eos
    }

    /// Fills up short rows.
    pub fn pad_id(&self) -> Option<u32> {
        self.rules.pad
    }

    /// The id of a token, by its exact spelling in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of an id in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// What stands for an empty context: BOS, else EOS (lm-evaluation-harness,
    /// `HFLM.prefix_token_id`).
    pub fn prefix_token(&self) -> Option<u32> {
        self.bos_id().or_else(|| self.eos_id())
    }

    /// Whether `add_special` puts BOS in front of a text.
    pub fn adds_bos(&self) -> bool {
        let first =
            self.inner.encode_fast("", true).ok().and_then(|e| e.get_ids().first().copied());
        first.is_some() && first == self.bos_id()
    }

    /// One more than the highest id, added tokens included; must not be more than the rows
    /// of the embedding.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// `model_max_length`; `None` where transformers wrote its "very large" number.
    pub fn model_max_length(&self) -> Option<usize> {
        self.rules.max_length
    }

    /// The folder's Jinja chat template, not evaluated here.
    pub fn chat_template(&self) -> Option<&str> {
        self.rules.chat_template.as_deref()
    }

    /// Hex BLAKE3 of `tokenizer.json` and of the rules that add tokens: two tokenizers with
    /// one fingerprint give the same ids.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn refused(error: tokenizers::Error) -> Error {
    Error::Tokenizer { why: error.to_string() }
}
