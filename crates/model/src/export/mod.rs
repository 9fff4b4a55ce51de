//! A relufied model as a Hugging Face folder: everything beside its weights.
//!
//! What stock transformers can express (stage 1: the family's own activation field) stays a
//! model of its family. Everything else gets a `model_type` of its own and a small Python
//! module, so that nobody loads it without its ReLUs unawares. Source of the conventions:
//! transformers `auto_factory.py`, `dynamic_module_utils.py`.

mod card;
mod config;
mod python;

use std::path::Path;

use relufy_spec::{ReluPlan, Source};
use serde_json::Value;

pub use config::{ExportConfig, export_config, stage_of};
pub use python::{PythonFile, python_files};

use crate::checkpoint::{copy_companions, write_config};
use crate::{Checkpoint, Error, Result};

/// Where a checkpoint came from, for the record of what was converted. Without a hash.
pub fn source_of(checkpoint: &Checkpoint) -> Source {
    Source {
        model: checkpoint.name().to_owned(),
        revision: checkpoint.revision().map(str::to_owned),
        weights_blake3: None,
    }
}

/// Writes everything but the weights of the model that `plan` makes of `checkpoint`: config,
/// tokenizer and generation files, model card, and the Python module where one is needed.
/// `folder` exists and is private to the caller (see [`crate::checkpoint::StagedDir`]).
///
/// # Errors
/// A plan that does not fit or cannot be expressed for others; a file that cannot be read
/// or written.
pub fn write_export(
    checkpoint: &Checkpoint,
    plan: &ReluPlan,
    source: Source,
    folder: &Path,
) -> Result<ExportConfig> {
    write_trained_export(checkpoint, plan, source, 0, folder)
}

/// As [`write_export`], for weights that were trained on so many tokens after the plan.
///
/// # Errors
/// As [`write_export`].
pub fn write_trained_export(
    checkpoint: &Checkpoint,
    plan: &ReluPlan,
    source: Source,
    tokens: u64,
    folder: &Path,
) -> Result<ExportConfig> {
    let mut export = export_config(checkpoint.config(), plan, source)?;
    export.add_tokens(tokens);
    if export.remote_code && needs_tokenizer_class(checkpoint)? {
        // `AutoTokenizer` would go by the `model_type`, and it does not know ours.
        let class = python::default_tokenizer(checkpoint.config().family)?;
        export.json.insert("tokenizer_class".to_owned(), class.into());
    }
    copy_companions(checkpoint, folder)?;
    write_config(folder, &export.json)?;
    if export.remote_code {
        for file in python_files(checkpoint.config().family)? {
            write(folder, file.name, &file.text)?;
        }
    }
    write(folder, "README.md", &card::model_card(&export))?;
    Ok(export)
}

/// Whether there is a tokenizer and no file says of which class.
fn needs_tokenizer_class(checkpoint: &Checkpoint) -> Result<bool> {
    let names = |json: &Value| json.get("tokenizer_class").is_some_and(|class| !class.is_null());
    let dir = checkpoint.dir();
    if !dir.join("tokenizer.json").is_file() {
        return Ok(false);
    }
    let path = dir.join("tokenizer_config.json");
    let own = if path.is_file() {
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        serde_json::from_str(&text).map_err(|source| Error::Json { path, source })?
    } else {
        Value::Null
    };
    let config = checkpoint.config().json.get("tokenizer_class");
    Ok(!names(&own) && config.is_none_or(Value::is_null))
}

fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    std::fs::write(&path, text).map_err(Error::io(&path))
}
