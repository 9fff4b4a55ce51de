//! A run's text, ready for training: sources tokenised, split, packed and mixed.

use std::sync::Arc;

use crate::cache::{self, TokenCache};
use crate::corpus::{CorpusConfig, SourceConfig};
use crate::packing::{Packed, PackedSource, PackingConfig, split};
use crate::{Error, Hub, Progress, Result, Tokenizer};

/// A run's text.
#[derive(Debug)]
pub struct Dataset {
    /// What is learnt.
    pub train: Packed,
    /// What is held out, where anything is.
    pub validation: Option<Packed>,
    fingerprint: String,
}

impl Dataset {
    /// Tokenises what the caches do not hold yet, and packs it.
    ///
    /// # Errors
    /// [`Error::Config`], those of reading the sources, [`Error::EmptyCorpus`],
    /// [`Error::TooFewTokens`] where a source has less than one training sequence.
    pub fn open(
        corpus: &CorpusConfig,
        packing: &PackingConfig,
        tokenizer: &Tokenizer,
        hub: &Hub,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<Self> {
        corpus.check()?;
        let folder = match &corpus.cache_dir {
            Some(folder) => folder.clone(),
            None => cache::default_dir()?,
        };
        let mut fingerprint = blake3::Hasher::new();
        let mut open = |source: &SourceConfig| -> Result<Arc<TokenCache>> {
            let cache =
                cache::open_or_build(source, corpus.add_eos, tokenizer, &folder, hub, progress)?;
            fingerprint.update(cache.checksum());
            Ok(Arc::new(cache))
        };

        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for source in &corpus.sources {
            let cache = open(source)?;
            let (learnt, held_out) = split(&source.path, &cache, corpus.validation_fraction)?;
            enough(&source.path, &learnt, packing.sequence_length)?;
            train.push(learnt);
            validation.extend(held_out);
        }
        for source in &corpus.validation {
            let cache = open(source)?;
            let (all, _) = split(&source.path, &cache, 0.0)?;
            enough(&source.path, &all, 1)?;
            validation.push(all);
        }

        let weights: Vec<f64> = corpus.sources.iter().filter_map(|source| source.weight).collect();
        for number in [packing.sequence_length as u64, u64::from(packing.document_boundaries), seed]
            .into_iter()
            .chain([corpus.validation_fraction.to_bits(), corpus.sources.len() as u64])
            .chain(weights.iter().map(|weight| weight.to_bits()))
        {
            fingerprint.update(&number.to_le_bytes());
        }

        let pad = tokenizer.eos_id().unwrap_or(0);
        let validation = match validation.is_empty() {
            true => None,
            false => {
                Some(Packed::new("the validation split", validation, &[], *packing, seed, pad)?)
            }
        };
        Ok(Dataset {
            train: Packed::new("the training split", train, &weights, *packing, seed, pad)?,
            validation,
            fingerprint: fingerprint.finalize().to_hex().to_string(),
        })
    }

    /// Hex BLAKE3 of all that a batch depends on: tokens, splits, packing, weights, seed. A
    /// run resumes exactly only where it is the same.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

fn enough(what: &str, source: &PackedSource, length: usize) -> Result<()> {
    // One more than a row, as the last id needs a position before it.
    if source.tokens() <= length as u64 {
        return Err(Error::TooFewTokens {
            what: what.to_owned(),
            tokens: source.tokens(),
            sequence_length: length,
        });
    }
    Ok(())
}
