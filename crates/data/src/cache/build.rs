//! From files to a token cache: hashed, looked up, and tokenised only where it must be.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;

use super::write::{Tokenised, Writer};
use super::{TokenCache, VERSION};
use crate::corpus::{Document, Documents, SourceConfig, files, format_of};
use crate::{Error, Hub, Progress, Result, Tokenizer};

/// Text that is tokenised at a time: enough for all cores, little for the memory.
const BATCH_BYTES: usize = 4 << 20;
const BATCH_DOCUMENTS: usize = 4096;

/// The tokens of a source, from the cache or through it.
///
/// # Errors
/// Those of reading the source; [`Error::EmptyCorpus`]; [`Error::Io`] of the cache folder.
pub(crate) fn open_or_build(
    source: &SourceConfig,
    add_eos: bool,
    tokenizer: &Tokenizer,
    folder: &Path,
    hub: &Hub,
    progress: &dyn Progress,
) -> Result<TokenCache> {
    let files = files(source, hub, progress)?;
    let key = key(source, &files, add_eos, tokenizer)?;
    let path = folder.join(format!("{}.tokens", key.to_hex()));
    let key = *key.as_bytes();
    if path.exists() {
        match TokenCache::open(&path, &key)? {
            Ok(cache) => return Ok(cache),
            Err(why) => {
                tracing::warn!("{} {why}; tokenising again", path.display());
                progress.message(&format!("{} {why}; tokenising again", path.display()));
            }
        }
    }
    build(source, files, add_eos, tokenizer, &path, key, progress)?;
    TokenCache::open(&path, &key)?.map_err(|why| Error::bad_file(&path, why))
}

/// The hash of all that the tokens depend on.
fn key(
    source: &SourceConfig,
    files: &[PathBuf],
    add_eos: bool,
    tokenizer: &Tokenizer,
) -> Result<blake3::Hash> {
    let hashes: Vec<blake3::Hash> =
        files.par_iter().map(|file| hash(file)).collect::<Result<_>>()?;
    // Where the files lie and how often they are drawn does not change their tokens.
    let options = SourceConfig { path: String::new(), weight: None, ..source.clone() };
    let options = serde_json::to_vec(&options).map_err(|e| Error::config("sources", e))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(&[u8::from(add_eos)]);
    hasher.update(tokenizer.fingerprint().as_bytes());
    hasher.update(&(options.len() as u64).to_le_bytes());
    hasher.update(&options);
    for (file, hash) in files.iter().zip(hashes) {
        hasher.update(&[format_of(file, source.format)? as u8]);
        hasher.update(hash.as_bytes());
    }
    Ok(hasher.finalize())
}

fn hash(path: &Path) -> Result<blake3::Hash> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(|e| Error::io(path, e))?;
    Ok(hasher.finalize())
}

/// A share of the documents, and how many bytes of the files it took.
type Batch = Result<(Vec<Document>, u64)>;

fn build(
    source: &SourceConfig,
    files: Vec<PathBuf>,
    add_eos: bool,
    tokenizer: &Tokenizer,
    path: &Path,
    key: [u8; 32],
    progress: &dyn Progress,
) -> Result<()> {
    let total: u64 = files.iter().filter_map(|file| file.metadata().ok()).map(|m| m.len()).sum();
    let eos = tokenizer.eos_id();
    let eos_text = eos.and_then(|id| tokenizer.token(id)).unwrap_or_default();
    let mut writer = Writer::create(path, key, tokenizer.vocab_size())?;
    progress.start(&format!("tokenising {}", source.path), Some(total));
    let outcome = std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Batch>(2);
        scope.spawn(move || {
            let mut documents = Documents::over(source, files, &eos_text);
            loop {
                let batch = read_batch(&mut documents);
                let last = !matches!(&batch, Ok((documents, _)) if !documents.is_empty());
                // Nobody listens any more after an error on the other side.
                if sender.send(batch).is_err() || last {
                    return;
                }
            }
        });
        let mut reported = 0;
        for batch in receiver {
            let (documents, bytes_read) = batch?;
            let eos = eos.filter(|_| add_eos);
            let tokenised: Vec<Tokenised> = documents
                .par_iter()
                .map(|document| tokenise(document, tokenizer, eos))
                .collect::<Result<_>>()?;
            for document in tokenised.iter().filter(|document| !document.ids.is_empty()) {
                writer.push(document)?;
            }
            progress.advance(bytes_read - reported);
            reported = bytes_read;
        }
        // Parquet is not read from front to back, so it does not count.
        progress.advance(total - reported.min(total));
        Ok(())
    });
    progress.finish();
    outcome?;
    if writer.documents() == 0 {
        return Err(Error::EmptyCorpus { what: source.path.clone() });
    }
    writer.finish()
}

fn read_batch(documents: &mut Documents) -> Batch {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BATCH_BYTES && batch.len() < BATCH_DOCUMENTS {
        let Some(document) = documents.next().transpose()? else { break };
        bytes += document.text.len();
        batch.push(document);
    }
    Ok((batch, documents.bytes_read()))
}

/// The ids of a document as the model will see them: with BOS where the tokenizer adds it,
/// and with EOS at the end where there is none.
fn tokenise(document: &Document, tokenizer: &Tokenizer, eos: Option<u32>) -> Result<Tokenised> {
    if document.masked.is_empty() {
        let mut ids = tokenizer.encode(&document.text, true)?;
        if let Some(eos) = eos.filter(|eos| ids.last() != Some(eos)) {
            ids.push(eos);
        }
        return Ok(Tokenised { ids, learnt: None });
    }
    let encoded = tokenizer.encode_with_offsets(&document.text, true)?;
    let mut ids = Vec::with_capacity(encoded.len() + 1);
    let mut learnt = Vec::with_capacity(encoded.len() + 1);
    for (id, range) in encoded {
        // A token that reaches beyond the prompt is one that the model must produce. Added
        // tokens stand for no text: BOS is given, EOS is settled below.
        let masked = document.masked.iter().any(|m| m.start <= range.start && range.end <= m.end);
        learnt.push(!range.is_empty() && !masked);
        ids.push(id);
    }
    if let Some(eos) = eos {
        let ends_learnt = document.masked.iter().all(|m| m.end < document.text.len());
        if ids.last() == Some(&eos) {
            learnt.pop();
        } else {
            ids.push(eos);
        }
        learnt.push(ends_learnt);
    }
    Ok(Tokenised { ids, learnt: Some(learnt) })
}
