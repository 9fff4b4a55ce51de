//! What stands for a model in a cache of answers: a hash of all that its answers depend on.

use relufy_data::Tokenizer;
use relufy_model::Checkpoint;
use relufy_model::checkpoint::hash_file;
use relufy_spec::Stage;

use crate::{Error, Result};

/// The identity of a checkpoint on which `stage` is worked in memory: its weights, config
/// and tokenizer, and the version of this program, whose arithmetic may change. `arithmetic` names
/// one that is not f32 on the CPU.
///
/// # Errors
/// A file that cannot be read.
pub fn identity(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    stage: Stage,
    arithmetic: &str,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.update(&[u8::from(stage)]);
    hasher.update(arithmetic.as_bytes());
    hasher.update(tokenizer.fingerprint().as_bytes());
    let mut files = checkpoint.weight_files();
    files.push(checkpoint.dir().join("config.json"));
    for file in files {
        hash_file(&file, &mut hasher)
            .map_err(|source| Error::Read { path: file.clone(), source })?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
