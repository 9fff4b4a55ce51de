//! The seam to whoever writes the files beside the weights of a relufied model. Training
//! does not know how a plan becomes a Hugging Face folder; the caller hands that in.

use std::path::Path;

use relufy_model::Checkpoint;
use relufy_model::checkpoint::{copy_companions, write_config};
use relufy_spec::ReluPlan;

use crate::{Error, Result};

/// What an export may fail with.
pub type ExportError = Box<dyn std::error::Error + Send + Sync>;

/// Writes everything but the weights.
pub trait Export {
    /// Writes `config.json` and the files that travel with it into `folder`, for the model
    /// that `plan` makes of `source`. The plan is not empty.
    ///
    /// # Errors
    /// A plan that cannot be exported; a file system that refuses.
    fn write(
        &self,
        source: &Checkpoint,
        plan: &ReluPlan,
        folder: &Path,
    ) -> std::result::Result<(), ExportError>;
}

impl<F> Export for F
where
    F: Fn(&Checkpoint, &ReluPlan, &Path) -> std::result::Result<(), ExportError>,
{
    fn write(
        &self,
        source: &Checkpoint,
        plan: &ReluPlan,
        folder: &Path,
    ) -> std::result::Result<(), ExportError> {
        self(source, plan, folder)
    }
}

/// Writes config and companions of `source` after `plan`, and adds `tokens` to what the
/// `relufication` block says about fine-tuning, where there is one.
pub(crate) fn write_companions(
    export: &dyn Export,
    source: &Checkpoint,
    plan: &ReluPlan,
    tokens: u64,
    folder: &Path,
) -> Result<()> {
    if *plan == ReluPlan::default() {
        write_config(folder, &source.config().json)?;
        copy_companions(source, folder)?;
    } else {
        export.write(source, plan, folder).map_err(|why| Error::Export { why })?;
    }
    let path = folder.join(crate::folder::CONFIG);
    let text = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
    let mut json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&text).map_err(|error| Error::damaged(&path, error))?;
    let Some(block) = json.get_mut("relufication").and_then(|block| block.as_object_mut()) else {
        return Ok(());
    };
    let before = block.get("tokens_trained").and_then(serde_json::Value::as_u64).unwrap_or(0);
    block.insert("tokens_trained".to_string(), (before + tokens).into());
    Ok(write_config(folder, &json)?)
}
