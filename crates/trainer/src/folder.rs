//! The folder of a run: which checkpoints lie in it, which go, what a killed run left over.
//!
//! ```text
//! output_dir/
//!   train.toml          the resolved configuration
//!   metrics.jsonl       one line a logged step
//!   tensorboard/        event files
//!   checkpoint-N/       a model, and what resuming needs
//!   final/              the trained model
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use relufy_model::checkpoint::STAGED_PREFIX;

use crate::{Error, Result};

/// Names a checkpoint that is being removed, so that no reader takes half of it for whole.
const REMOVED_PREFIX: &str = ".relufy-removed-";

/// The files that every complete checkpoint holds beside its weights.
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const OPTIMIZER: &str = "optimizer.safetensors";
pub(crate) const TRAINER_STATE: &str = "trainer_state.json";
pub(crate) const RESUME: &str = "resume.json";

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    root: PathBuf,
}

/// A checkpoint on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedCheckpoint {
    /// Optimiser steps done.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

impl RunFolder {
    /// The folder of a new run; it must not exist, or be empty. Nothing is written yet.
    ///
    /// # Errors
    /// A folder that holds something.
    pub fn fresh(root: &Path) -> Result<RunFolder> {
        match fs::read_dir(root).map(|mut entries| entries.next().is_none()) {
            Ok(false) => Err(Error::OutputExists { path: root.into() }),
            Ok(true) => Ok(RunFolder { root: root.into() }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Ok(RunFolder { root: root.into() })
            }
            Err(source) => Err(Error::io(root, source)),
        }
    }

    /// The folder of a run to continue. A run that was killed before it wrote anything may
    /// have left it empty or not made it at all.
    ///
    /// # Errors
    /// A folder that holds something, but no `train.toml`.
    pub fn existing(root: &Path) -> Result<RunFolder> {
        let folder = RunFolder { root: root.into() };
        if folder.config().is_file() || folder.only_leftovers()? {
            return Ok(folder);
        }
        Err(Error::NotARun { path: root.into() })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.root.join("train.toml")
    }

    /// One line a logged step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// TensorBoard's folder.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The trained model.
    pub fn final_model(&self) -> PathBuf {
        self.root.join("final")
    }

    /// Where the checkpoint after `step` steps goes.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.root.join(format!("checkpoint-{step}"))
    }

    /// The complete checkpoints, oldest first.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn checkpoints(&self) -> Result<Vec<SavedCheckpoint>> {
        let mut found: Vec<SavedCheckpoint> = self
            .entries()?
            .into_iter()
            .filter_map(|path| {
                let number = path.file_name()?.to_str()?.strip_prefix("checkpoint-")?;
                let step = number.parse().ok()?;
                Some(SavedCheckpoint { step, path })
            })
            .filter(|saved| self.checkpoint(saved.step) == saved.path && is_complete(&saved.path))
            .collect();
        found.sort_by_key(|saved| saved.step);
        Ok(found)
    }

    /// Removes the oldest checkpoints, so that `limit` remain.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn prune(&self, limit: Option<usize>) -> Result<()> {
        let Some(limit) = limit else { return Ok(()) };
        let saved = self.checkpoints()?;
        saved
            .iter()
            .take(saved.len().saturating_sub(limit))
            .try_for_each(|old| self.remove(&old.path))
    }

    /// Removes a folder of the run, if it is there: first its name, then what it holds.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn remove(&self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = self.root.join(format!("{REMOVED_PREFIX}{name}"));
        match fs::rename(path, &hidden) {
            Ok(()) => fs::remove_dir_all(&hidden).map_err(|source| Error::io(&hidden, source)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::io(path, source)),
        }
    }

    /// Removes what a killed run left half done; how many files and folders that was.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn clean(&self) -> Result<usize> {
        let mut leftovers = self.entries()?;
        leftovers.retain(|path| is_leftover(path));
        for path in &leftovers {
            let removed =
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            removed.map_err(|source| Error::io(path, source))?;
        }
        Ok(leftovers.len())
    }

    fn only_leftovers(&self) -> Result<bool> {
        Ok(self.entries()?.iter().all(|path| is_leftover(path)))
    }

    /// What lies in the folder; nothing if there is none.
    fn entries(&self) -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::io(&self.root, source)),
        };
        entries
            .map(|entry| Ok(entry.map_err(|source| Error::io(&self.root, source))?.path()))
            .collect()
    }
}

/// Checkpoints appear whole, by a rename; one with a file missing was tampered with.
fn is_complete(path: &Path) -> bool {
    [CONFIG, OPTIMIZER, TRAINER_STATE, RESUME].iter().all(|name| path.join(name).is_file())
}

fn is_leftover(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with(STAGED_PREFIX) || name.starts_with(REMOVED_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(root: &Path, step: u64, files: &[&str]) {
        let path = root.join(format!("checkpoint-{step}"));
        fs::create_dir_all(&path).unwrap();
        files.iter().for_each(|name| fs::write(path.join(name), "x").unwrap());
    }

    const ALL: [&str; 4] = [CONFIG, OPTIMIZER, TRAINER_STATE, RESUME];

    #[test]
    fn incomplete_and_foreign_folders_are_no_checkpoints() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        fake(root, 9, &ALL);
        fake(root, 10, &ALL);
        fake(root, 20, &ALL[..3]);
        fs::create_dir(root.join("checkpoint-best")).unwrap();
        fs::rename(root.join("checkpoint-9"), root.join("checkpoint-009")).unwrap();
        let steps: Vec<u64> = RunFolder { root: root.into() }
            .checkpoints()
            .unwrap()
            .iter()
            .map(|saved| saved.step)
            .collect();
        assert_eq!(steps, [10]);
    }

    #[test]
    fn pruning_keeps_the_newest_by_number() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        [90, 100, 110].into_iter().for_each(|step| fake(root, step, &ALL));
        let folder = RunFolder { root: root.into() };
        folder.prune(None).unwrap();
        assert_eq!(folder.checkpoints().unwrap().len(), 3);
        folder.prune(Some(2)).unwrap();
        let steps: Vec<u64> =
            folder.checkpoints().unwrap().iter().map(|saved| saved.step).collect();
        assert_eq!(steps, [100, 110]);
    }

    #[test]
    fn leftovers_are_cleaned_and_nothing_else() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        fs::create_dir(root.join(format!("{STAGED_PREFIX}abc"))).unwrap();
        fs::write(root.join(format!("{STAGED_PREFIX}def")), "x").unwrap();
        fs::create_dir(root.join(format!("{REMOVED_PREFIX}10"))).unwrap();
        let folder = RunFolder::existing(root).unwrap();
        fs::write(root.join("notes.txt"), "x").unwrap();
        assert_eq!(folder.clean().unwrap(), 3);
        let left: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["notes.txt"]);
        assert!(matches!(RunFolder::existing(root), Err(Error::NotARun { .. })));
        assert!(matches!(RunFolder::fresh(root), Err(Error::OutputExists { .. })));
    }
}
