//! Weights that were packed before, kept in a file: read instead of packed again.
//!
//! A file belongs to one content: its name and its header carry a hash of the checkpoint's weight
//! files, of the decoder that surgery makes of them, of the format and of the layout. Everything in it
//! is checksummed and is checked whenever it is read, so a file that is damaged, cut short or
//! another's is packed again and never computed with. It appears whole or not at all: processes that
//! write it at the same time do not disturb each other or those that read it. What an interrupted write
//! leaves behind is removed by the next; files whose model changed are listed ([`PackedCache::entries`]),
//! and removed by whoever asks for it.
//!
//! Matrices are copied out of the file, into pages as large as the system gives: decoding straight from
//! a mapped file was slower, because files lie in small pages and rows are skipped to.

mod entries;
mod file;
mod key;
mod origin;
mod partial;
mod write;

use std::path::{Path, PathBuf};

use relufy_data::Progress;
use relufy_model::Checkpoint;
use relufy_spec::{DecoderSpec, ReluPlan};

pub use entries::{PackedEntry, PackedState};
pub(crate) use file::PackedFile;

use origin::Origin;

use crate::weights::Weights;
use crate::{Calibrated, Engine, Options, Result};

/// A folder with packed weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedCache {
    dir: PathBuf,
}

/// An engine, and what became of the cache.
pub struct Opened {
    /// The engine.
    pub engine: Engine,
    /// The file of its weights.
    pub path: PathBuf,
    /// Whether they were taken from it, or packed and written to it.
    pub was_there: bool,
    /// What went wrong on the way, for people: a damaged file, a full disk. The engine is as good as
    /// without.
    pub notes: Vec<String>,
    /// Files that were of use until these weights were packed: of the same model with other weights,
    /// or by another version of the program. They stay until somebody removes them.
    pub superseded: Vec<PackedEntry>,
}

impl PackedCache {
    /// A cache in a folder, which is made when something is kept in it.
    pub fn new(dir: impl Into<PathBuf>) -> PackedCache {
        PackedCache { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// An engine of a checkpoint after surgery: from the cache, or packed and kept in it.
    ///
    /// # Errors
    /// As [`Checkpoint::load_with`] and [`Engine::calibrated`]. What goes wrong with the cache is noted
    /// and does not hinder.
    pub fn open(
        &self,
        checkpoint: &Checkpoint,
        plan: &ReluPlan,
        options: &Options,
        calibrated: &Calibrated,
        progress: &dyn Progress,
    ) -> Result<Opened> {
        let spec = plan.apply(&checkpoint.config().spec).map_err(relufy_model::Error::from)?;
        let weights = origin::Weights::of(checkpoint)?;
        let origin = Origin::new(checkpoint, options.format, weights);
        let key = key::of(&origin, &spec, calibrated)?;
        let path = self.dir.join(key::file_name(checkpoint.name(), options.format, &key));
        let mut notes = Vec::new();
        match read(&path, &key, &spec, options, calibrated) {
            Ok(Some(engine)) => {
                let superseded = Vec::new();
                return Ok(Opened { engine, path, was_there: true, notes, superseded });
            }
            Ok(None) => {}
            Err(why) => notes.push(format!("{}: {why}; packing again", path.display())),
        }
        progress.start("packing weights", None);
        let decoder = checkpoint.load_with(&candle_core::Device::Cpu, plan)?;
        let engine = Engine::calibrated(&decoder, options, calibrated)?;
        progress.finish();
        if let Err(why) = write::write(&path, (&key, &origin), &engine, decoder.params()) {
            notes.push(format!("{}: {why}; the packed weights are not kept", path.display()));
        }
        let superseded = self.superseded(&origin);
        Ok(Opened { engine, path, was_there: false, notes, superseded })
    }
}

/// The engine in a file; `None` where there is no file. The error is for people.
fn read(
    path: &Path,
    key: &str,
    spec: &DecoderSpec,
    options: &Options,
    calibrated: &Calibrated,
) -> std::result::Result<Option<Engine>, String> {
    let Some(file) = PackedFile::open(path, key)? else { return Ok(None) };
    let engine = Engine::pack(spec, &Weights::File(&file), options, calibrated);
    engine.map(Some).map_err(|error| error.to_string())
}
