//! Which files make a model, and where they lie.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::remote::{Remote, plain_path};
use crate::{Error, Progress, Result};

/// How much of a model is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// `config.json` and `generation_config.json`.
    Config,
    /// The tokenizer's files, too.
    Tokenizer,
    /// The weights, the model card, the licence and Python files, too.
    Everything,
}

impl Need {
    /// Whether a file of a repository, other than weights, is wanted.
    fn wants(self, file: &str) -> bool {
        const CONFIG: [&str; 2] = ["config.json", "generation_config.json"];
        const TOKENIZER: [&str; 9] = [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
            "chat_template.jinja",
            "chat_template.json",
        ];
        let tokenizer = self >= Need::Tokenizer && TOKENIZER.contains(&file);
        // Python files are carried over to an export; nothing here runs them.
        let companion = self >= Need::Everything
            && !file.contains('/')
            && (file == "README.md"
                || file.ends_with(".py")
                || file.to_ascii_uppercase().starts_with("LICENSE"));
        CONFIG.contains(&file) || tokenizer || companion
    }
}

/// The weight files of a model; shards in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Not asked for, or absent.
    None,
    /// `model.safetensors`, or the shards that its index names.
    Safetensors(Vec<PathBuf>),
    /// `pytorch_model.bin`, or the shards that its index names.
    PyTorch(Vec<PathBuf>),
}

impl Weights {
    /// The files, whatever their format.
    pub fn files(&self) -> &[PathBuf] {
        match self {
            Weights::None => &[],
            Weights::Safetensors(files) | Weights::PyTorch(files) => files,
        }
    }
}

/// A model's files on this machine.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// What was asked for.
    pub reference: String,
    /// The folder that holds the files.
    pub folder: PathBuf,
    /// The hub's commit; `None` for a local folder.
    pub revision: Option<String>,
    /// The weights.
    pub weights: Weights,
}

impl ModelFiles {
    /// Where a file lies, if it exists.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file that may be missing.
    pub fn existing(&self, name: &str) -> Option<PathBuf> {
        Some(self.path(name)).filter(|path| path.is_file())
    }

    /// `config.json`.
    ///
    /// # Errors
    /// [`Error::MissingFile`].
    pub fn config(&self) -> Result<PathBuf> {
        self.existing("config.json").ok_or_else(|| Error::MissingFile {
            folder: self.folder.clone(),
            file: "config.json".to_owned(),
        })
    }

    pub(super) fn local(
        reference: &str,
        folder: PathBuf,
        revision: Option<String>,
        need: Need,
    ) -> Result<Self> {
        let weights = match need {
            Need::Everything => find_weights(
                |file| folder.join(file).is_file(),
                |file| {
                    let path = folder.join(file);
                    if path.is_file() {
                        return Ok(path);
                    }
                    Err(Error::MissingFile { folder: folder.clone(), file: file.to_owned() })
                },
            )?,
            _ => Weights::None,
        };
        Ok(ModelFiles { reference: reference.to_owned(), folder, revision, weights })
    }

    pub(super) fn fetch(
        reference: &str,
        remote: &Remote,
        need: Need,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // Config first: a repository without one costs no download of weights.
        remote.fetch("config.json", progress)?;
        for file in remote.files().iter().filter(|file| need.wants(file)) {
            remote.fetch(file, progress)?;
        }
        let weights = match need {
            Need::Everything => find_weights(
                |file| remote.files().iter().any(|f| f == file),
                |file| remote.fetch(file, progress),
            )?,
            _ => Weights::None,
        };
        Ok(ModelFiles {
            reference: reference.to_owned(),
            folder: remote.folder().to_path_buf(),
            revision: Some(remote.commit().to_owned()),
            weights,
        })
    }
}

/// The order in which transformers looks: safetensors before pickles, one file before an
/// index.
fn find_weights(
    has: impl Fn(&str) -> bool,
    fetch: impl Fn(&str) -> Result<PathBuf>,
) -> Result<Weights> {
    type Make = fn(Vec<PathBuf>) -> Weights;
    let layouts: [(&str, Make); 2] =
        [("model.safetensors", Weights::Safetensors), ("pytorch_model.bin", Weights::PyTorch)];
    for (single, weights) in layouts {
        if has(single) {
            return Ok(weights(vec![fetch(single)?]));
        }
        let index = format!("{single}.index.json");
        if has(&index) {
            let index = fetch(&index)?;
            let shards = shards(&index)?;
            return Ok(weights(shards.iter().map(|s| fetch(s)).collect::<Result<_>>()?));
        }
    }
    Ok(Weights::None)
}

/// The files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read(index).map_err(|e| Error::io(index, e))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::bad_file(index, e))?;
    let map = json
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| Error::bad_file(index, "there is no object `weight_map`"))?;
    let mut shards = BTreeSet::new();
    for (tensor, file) in map {
        let name = file
            .as_str()
            // An index must not lead out of its folder.
            .filter(|name| plain_path(name).is_some_and(|p| p.components().count() == 1))
            .ok_or_else(|| {
                Error::bad_file(index, format!("`{tensor}` is in {file}, which is no file name"))
            })?;
        shards.insert(name.to_owned());
    }
    if shards.is_empty() {
        return Err(Error::bad_file(index, "`weight_map` is empty"));
    }
    Ok(shards)
}
