//! A relufied copy of a model folder. Only its description changes.

use std::fs;
use std::path::{Path, PathBuf};

use relufy_data::Progress;
use relufy_model::checkpoint::{StagedDir, copy_companions};
use relufy_model::export::{source_of, write_export};
use relufy_model::{Checkpoint, Error as ModelError};
use relufy_spec::{ReluPlan, Relufication, Stage};
use serde::Serialize;

use crate::link::{Linked, link_or_copy};
use crate::{Result, SurgeryRequest};

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The new folder.
    pub path: PathBuf,
    /// The record in its config; `None` for a dense model that stayed dense.
    pub relufication: Option<Relufication>,
    /// Whether loading it in transformers takes `trust_remote_code`.
    pub remote_code: bool,
    /// Whether the decoder computes anything else than before.
    pub changed: bool,
    /// The weight files, and how they came there.
    pub weights: Vec<(String, Linked)>,
}

/// Writes to `out` the model that `request` makes of `checkpoint`. Weights are linked or
/// copied byte for byte, and so are tokenizer and generation files.
///
/// # Errors
/// A request that does not fit; `out` exists; a file system that refuses. Nothing is left
/// behind then.
pub fn surgery(
    checkpoint: &Checkpoint,
    request: &SurgeryRequest,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Report> {
    let config = checkpoint.config();
    let plan = request.plan(&config.spec)?;
    let staged = StagedDir::create(out)?;
    let (relufication, remote_code) = if request.stage == Stage::Dense {
        identity(checkpoint, staged.path())?
    } else {
        export(checkpoint, &plan, staged.path(), progress)?
    };
    let weights = link_weights(checkpoint, staged.path(), progress)?;
    let changed = plan.apply(&config.spec)? != config.spec;
    staged.commit()?;
    Ok(Report { path: out.to_owned(), relufication, remote_code, changed, weights })
}

/// The config and its companions, byte for byte.
fn identity(checkpoint: &Checkpoint, to: &Path) -> Result<(Option<Relufication>, bool)> {
    copy_companions(checkpoint, to)?;
    copy_file(&checkpoint.dir().join("config.json"), to)?;
    let config = checkpoint.config();
    let remote_code = config.json.contains_key("auto_map");
    Ok((config.relufication.clone(), remote_code))
}

fn export(
    checkpoint: &Checkpoint,
    plan: &ReluPlan,
    to: &Path,
    progress: &dyn Progress,
) -> Result<(Option<Relufication>, bool)> {
    let mut source = source_of(checkpoint);
    let earlier = checkpoint.config().relufication.as_ref().and_then(|block| block.source.as_ref());
    // A commit of the hub says which weights; a folder's name does not.
    if source.revision.is_none() && earlier.is_none() {
        source.weights_blake3 = Some(hash(&checkpoint.weight_files(), progress)?);
    }
    let written = write_export(checkpoint, plan, source, to)?;
    Ok((Some(written.relufication), written.remote_code))
}

/// Weight files, and the index of shards.
fn link_weights(
    checkpoint: &Checkpoint,
    to: &Path,
    progress: &dyn Progress,
) -> Result<Vec<(String, Linked)>> {
    let mut linked = Vec::new();
    for file in checkpoint.weight_files() {
        let Some(name) = file.file_name() else { continue };
        let how = link_or_copy(&file, &to.join(name), progress)?;
        linked.push((name.to_string_lossy().into_owned(), how));
    }
    // A folder may hold other weights besides, such as pickled ones: only what was read
    // travels, and only its index.
    let stem = match linked.first() {
        Some((name, _)) if name.ends_with(".bin") => "pytorch_model.bin",
        _ => "model.safetensors",
    };
    let index = checkpoint.dir().join(format!("{stem}.index.json"));
    if !linked.iter().any(|(name, _)| name == stem) {
        copy_file(&index, to)?;
    }
    Ok(linked)
}

fn copy_file(file: &Path, to: &Path) -> Result<()> {
    let target = to.join(file.file_name().unwrap_or_default());
    let bytes = fs::read(file).map_err(ModelError::io(file))?;
    Ok(fs::write(&target, bytes).map_err(ModelError::io(&target))?)
}

/// Hex BLAKE3 of files, one after the other.
fn hash(files: &[PathBuf], progress: &dyn Progress) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let file = fs::File::open(path).map_err(ModelError::io(path))?;
        let total = file.metadata().map_err(ModelError::io(path))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        progress.start(&format!("hashing {name}"), Some(total));
        let reader = Watched { file, progress };
        hasher.update_reader(reader).map_err(ModelError::io(path))?;
        progress.finish();
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A file that reports how much of it was read.
struct Watched<'a> {
    file: fs::File,
    progress: &'a dyn Progress,
}

impl std::io::Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.progress.advance(n as u64);
        Ok(n)
    }
}
