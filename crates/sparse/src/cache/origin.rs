//! Where packed weights come from, so that people can be told, and whether they are still of use.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use relufy_model::Checkpoint;
use relufy_model::checkpoint::hash_file;
use serde::{Deserialize, Serialize};

use crate::{Format, Result};

/// What packed weights were made from, and by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Origin {
    /// Version of the program.
    pub relufy: String,
    /// Hub id, or the folder's name.
    pub model: String,
    pub format: Format,
    pub weights: Weights,
}

/// A checkpoint's weight files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Weights {
    pub files: Vec<WeightFile>,
    /// Of what they hold.
    pub hash: String,
}

/// A weight file as it was when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightFile {
    pub path: PathBuf,
    pub bytes: u64,
    /// Nanoseconds since 1970; 0 where the system does not say.
    pub modified: u64,
}

/// What became of weights since they were packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Same,
    Changed,
    Gone,
}

impl Origin {
    pub fn new(checkpoint: &Checkpoint, format: Format, weights: Weights) -> Origin {
        let (relufy, model) = (version().to_owned(), checkpoint.name().to_owned());
        Origin { relufy, model, format, weights }
    }
}

/// Version of the program.
pub(super) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

impl Weights {
    /// Reads all that a checkpoint's weight files hold.
    pub fn of(checkpoint: &Checkpoint) -> Result<Weights> {
        let paths = checkpoint.weight_files();
        let of = |path: &Path| WeightFile::of(path).map_err(failed(path));
        // Looked at before they are read: what changes meanwhile is then not what was looked at.
        let files = paths.iter().map(|path| of(path)).collect::<Result<_>>()?;
        Ok(Weights { files, hash: hash(&paths)? })
    }

    /// What became of them. They are read only where sizes or times say that they may differ.
    pub fn fate(&self) -> Fate {
        if self.files.iter().any(|file| fs::metadata(&file.path).is_err()) {
            return Fate::Gone;
        }
        let same = |file: &WeightFile| {
            file.modified != 0 && WeightFile::of(&file.path).is_ok_and(|now| now == *file)
        };
        if self.files.iter().all(same) {
            return Fate::Same;
        }
        let paths: Vec<&Path> = self.files.iter().map(|file| file.path.as_path()).collect();
        match hash(&paths) {
            Ok(hash) if hash == self.hash => Fate::Same,
            _ => Fate::Changed,
        }
    }

    /// Whether they lie where others lay whose content was another.
    pub fn replace(&self, others: &Weights) -> bool {
        let paths = |weights: &Weights| weights.files.iter().map(|f| f.path.clone()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) = (paths(self), paths(others));
        ours == theirs && self.hash != others.hash
    }
}

impl WeightFile {
    fn of(path: &Path) -> std::io::Result<WeightFile> {
        let metadata = fs::metadata(path)?;
        let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0);
        // Not resolved further: a link of the hub's cache that leads elsewhere is another content.
        Ok(WeightFile { path: std::path::absolute(path)?, bytes: metadata.len(), modified })
    }
}

/// A hash of what files hold, one after the other.
fn hash<P: AsRef<Path>>(paths: &[P]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in paths.iter().map(AsRef::as_ref) {
        hash_file(path, &mut hasher).map_err(failed(path))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> crate::Error {
    move |source| relufy_model::Error::Io { path: path.to_owned(), source }.into()
}
