//! The files beside the weights: config, tokenizer, generation settings.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::Checkpoint;
use crate::{Error, Result};

/// The files of a tokenizer and of what text generation needs, where they exist.
pub const TOKENIZER_FILES: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Copies, byte for byte, tokenizer and generation files, the licence, and Python modules
/// that the folder carries.
///
/// # Errors
/// A file that cannot be read or written.
pub fn copy_companions(from: &Checkpoint, to: &Path) -> Result<()> {
    let copy = |source: &Path, name: &std::ffi::OsStr| {
        // Read and write instead of fs::copy: a read-only source must not make a
        // read-only copy.
        let target = to.join(name);
        let bytes = fs::read(source).map_err(Error::io(source))?;
        fs::write(&target, bytes).map_err(Error::io(&target))
    };
    for entry in fs::read_dir(from.dir()).map_err(Error::io(from.dir()))? {
        let path = entry.map_err(Error::io(from.dir()))?.path();
        let Some(name) = path.file_name() else { continue };
        let python = path.extension().is_some_and(|extension| extension == "py");
        let known = name == "LICENSE" || TOKENIZER_FILES.iter().any(|known| name == *known);
        if path.is_file() && (python || known) {
            copy(&path, name)?;
        }
    }
    Ok(())
}

/// Writes `config.json`, keys in the order given, indented as Hugging Face does.
///
/// # Errors
/// A file that cannot be written.
pub fn write_config(dir: &Path, json: &Map<String, Value>) -> Result<()> {
    let path = dir.join("config.json");
    let text = serde_json::to_string_pretty(json)
        .map_err(|source| Error::Json { path: path.clone(), source })?;
    fs::write(&path, text + "\n").map_err(Error::io(&path))
}
