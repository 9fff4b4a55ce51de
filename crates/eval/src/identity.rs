//! What stands for a model in a cache of answers: a hash of all that its answers depend on.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use rayon::prelude::*;
use relufy_data::Tokenizer;
use relufy_model::Checkpoint;
use relufy_spec::Stage;

use crate::{Error, Result};

/// Bytes that one thread hashes at a time.
const PIECE: u64 = 32 << 20;

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
        hash(&file, &mut hasher).map_err(|source| Error::Read { path: file.clone(), source })?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Adds a file's length and the hashes of its pieces, which are read in parallel.
fn hash(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
    let length = path.metadata()?.len();
    let pieces = (0..length.div_ceil(PIECE))
        .into_par_iter()
        .map(|n| {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(n * PIECE))?;
            let mut bytes = Vec::new();
            file.take(PIECE).read_to_end(&mut bytes)?;
            Ok(blake3::hash(&bytes))
        })
        .collect::<std::io::Result<Vec<_>>>()?;
    hasher.update(&length.to_le_bytes());
    for piece in pieces {
        hasher.update(piece.as_bytes());
    }
    Ok(())
}
