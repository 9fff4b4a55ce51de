//! The folder of a quickstart: where everything lies, and whose folder it is.
//!
//! ```text
//! DIR/
//!   quickstart.json     what was asked for
//!   world/              text, tokenizer, questions
//!   donor/              the dense donor
//!   s1/ s2/ control-n1/ control-n2/   training runs; the models are in final/
//!   swap-s1/ swap-s2/   the donor relufied, not fine-tuned
//!   results/NAME/       results_TIME.json of a model, and its samples
//!   table.md table.csv  the outcome
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use relufy_model::checkpoint::{STAGED_PREFIX, write_atomic};
use relufy_spec::Stage;
use serde::{Deserialize, Serialize};

use super::{Options, donor, training};
use crate::error::{Error, Result};

/// The path in shipped configurations that stands for the folder.
const STANDS_FOR_FOLDER: &str = "runs/quickstart";

/// The folder of a quickstart.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    pub settings: Settings,
}

/// What decides the outcome; another call must ask for the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// Hash of what is built into the program and used: donor and configurations.
    pub contents: String,
    pub rebuild_donor: bool,
    pub steps_scale: f64,
}

impl Folder {
    /// Takes the folder, or finds that it was taken for the same.
    pub fn open(options: &Options) -> Result<Folder> {
        let root = options.dir.clone();
        let settings = Settings {
            contents: contents(options.rebuild_donor),
            rebuild_donor: options.rebuild_donor,
            steps_scale: options.steps_scale,
        };
        let file = root.join("quickstart.json");
        match fs::read(&file) {
            Ok(bytes) => {
                let found: Settings = serde_json::from_slice(&bytes)
                    .map_err(|source| Error::Manifest { path: file.clone(), source })?;
                found.demand(&settings, &root)?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if occupied(&root)? {
                    return Err(Error::Occupied { path: root });
                }
                fs::create_dir_all(&root).map_err(Error::io(&root))?;
                let mut text = serde_json::to_string_pretty(&settings)?;
                text.push('\n');
                write_atomic(&file, text.as_bytes())?;
            }
            Err(source) => return Err(Error::Io { path: file, source }),
        }
        Ok(Folder { root, settings })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn world(&self) -> PathBuf {
        self.path("world")
    }

    pub fn donor(&self) -> PathBuf {
        self.path("donor")
    }

    /// The model that a training run ends with.
    pub fn trained(&self, run: &str) -> PathBuf {
        self.path(run).join("final")
    }

    pub fn swapped(&self, stage: Stage) -> PathBuf {
        self.path(&format!("swap-s{}", u8::from(stage)))
    }

    /// The folder of a model's results.
    pub fn results(&self, model: &str) -> PathBuf {
        self.path("results").join(model)
    }

    /// A path of a shipped configuration, in this folder.
    pub fn rebase(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(STANDS_FOR_FOLDER) {
            Ok(inside) => self.root.join(inside),
            Err(_) => path.to_path_buf(),
        }
    }
}

impl Settings {
    fn demand(&self, now: &Settings, path: &Path) -> Result<()> {
        let differences = [
            ("--rebuild-donor", self.rebuild_donor.to_string(), now.rebuild_donor.to_string()),
            ("--steps-scale", self.steps_scale.to_string(), now.steps_scale.to_string()),
            ("the donor or the configurations", self.contents.clone(), now.contents.clone()),
        ];
        match differences.into_iter().find(|(_, before, now)| before != now) {
            None => Ok(()),
            Some((what, expected, found)) => {
                Err(Error::OtherSettings { path: path.to_owned(), what, expected, found })
            }
        }
    }
}

/// Hash of everything built in that an outcome depends on.
fn contents(rebuild_donor: bool) -> String {
    let mut hasher = blake3::Hasher::new();
    if rebuild_donor {
        hasher.update(donor::ARCHITECTURE.as_bytes());
        hasher.update(training::DONOR.config.as_bytes());
    } else {
        for (_, bytes) in donor::FILES {
            hasher.update(bytes);
        }
    }
    for run in &training::RUNS {
        hasher.update(run.config.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Whether something lies there that a killed call did not leave.
fn occupied(root: &Path) -> Result<bool> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(Error::Io { path: root.to_owned(), source }),
    };
    for entry in entries {
        let name = entry.map_err(Error::io(root))?.file_name();
        if !name.to_string_lossy().starts_with(STAGED_PREFIX) {
            return Ok(true);
        }
    }
    Ok(false)
}
