//! What stands for a file's content.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use rayon::prelude::*;

/// Bytes that one thread hashes at a time.
const PIECE: u64 = 32 << 20;

/// Adds a file's length and the hashes of its pieces, which are read in parallel.
///
/// # Errors
/// A file that cannot be read.
pub fn hash_file(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
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
