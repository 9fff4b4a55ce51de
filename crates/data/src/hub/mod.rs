//! Models and dataset files by name: a local folder, or `org/name[@revision]` on the hub.
//!
//! Downloads go through `hf-hub` into the cache that Hugging Face's own tools use. What
//! `hf-hub` leaves out stands here: offline use, pinning all files of one call to one
//! commit, and a check of lengths, so that a broken transfer never enters the cache.

mod model;
mod remote;
mod settings;

use std::path::PathBuf;
use std::sync::Arc;

pub use model::{ModelFiles, Need, Weights};
pub use settings::HubSettings;

use crate::{Error, Progress, Result};
use remote::{Kind, RepoId, Snapshot};

/// A hub and its cache. Cheap to clone; makes no request until asked for a file.
#[derive(Clone, Debug)]
pub struct Hub {
    settings: Arc<HubSettings>,
}

impl Hub {
    /// The hub that the environment describes, see [`HubSettings::from_env`].
    ///
    /// # Errors
    /// Where no cache folder can be named.
    pub fn from_env() -> Result<Self> {
        HubSettings::from_env().map(Self::new)
    }

    /// A hub with the given settings.
    pub fn new(settings: HubSettings) -> Self {
        Hub { settings: Arc::new(settings) }
    }

    /// The settings in use.
    pub fn settings(&self) -> &HubSettings {
        &self.settings
    }

    /// The files of a model: those of a folder if `reference` is one, else those of the
    /// hub repository `org/name[@revision]`, of which only what `need` asks for is fetched.
    ///
    /// # Errors
    /// [`Error::BadReference`], [`Error::UnknownRepository`], [`Error::NotCached`] offline,
    /// [`Error::Download`], [`Error::MissingFile`] for an index whose shard is missing.
    pub fn model(
        &self,
        reference: &str,
        need: Need,
        progress: &dyn Progress,
    ) -> Result<ModelFiles> {
        let folder = PathBuf::from(reference);
        if folder.is_dir() {
            return ModelFiles::local(reference, folder, None, need);
        }
        if folder.exists() {
            return Err(Error::bad_file(folder, "is a file: a model is a folder"));
        }
        let id = RepoId::parse(Kind::Model, reference)?;
        match self.snapshot(&id)? {
            Snapshot::Remote(remote) => ModelFiles::fetch(reference, &remote, need, progress),
            Snapshot::Cached { folder, commit, why } => {
                let not_cached = |missing: &str| Error::NotCached {
                    kind: id.kind.name(),
                    id: id.id.clone(),
                    revision: id.revision.clone(),
                    cache: self.settings.cache.clone(),
                    why: format!("{why} (the cached copy has no {missing})"),
                };
                if !folder.join("config.json").exists() {
                    return Err(not_cached("config.json"));
                }
                let files = ModelFiles::local(reference, folder, Some(commit), need)?;
                if matches!((need, &files.weights), (Need::Everything, Weights::None)) {
                    return Err(not_cached("weights"));
                }
                Ok(files)
            }
        }
    }

    /// One file of a dataset repository, `path` as the repository names it. `revision`
    /// defaults to `main`.
    ///
    /// # Errors
    /// As [`Hub::model`]; [`Error::Download`] where the repository has no such file.
    pub fn dataset_file(
        &self,
        repo: &str,
        revision: Option<&str>,
        path: &str,
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let id = RepoId::dataset(repo, revision)?;
        match self.snapshot(&id)? {
            Snapshot::Remote(remote) => remote.fetch(path, progress),
            Snapshot::Cached { folder, why, .. } => {
                let file =
                    folder.join(remote::plain_path(path).ok_or_else(|| Error::Download {
                        id: id.id.clone(),
                        file: path.to_owned(),
                        why: "is not a path within a repository".to_owned(),
                    })?);
                if file.exists() {
                    return Ok(file);
                }
                Err(Error::NotCached {
                    kind: id.kind.name(),
                    id: format!("{}/{path}", id.id),
                    revision: id.revision,
                    cache: self.settings.cache.clone(),
                    why,
                })
            }
        }
    }

    /// The paths of all files of a dataset repository, sorted; offline, of those that the
    /// cache holds.
    ///
    /// # Errors
    /// As [`Hub::model`].
    pub fn dataset_listing(&self, repo: &str, revision: Option<&str>) -> Result<Vec<String>> {
        let id = RepoId::dataset(repo, revision)?;
        match self.snapshot(&id)? {
            Snapshot::Remote(remote) => Ok(remote.files().to_vec()),
            Snapshot::Cached { folder, .. } => remote::walk(&folder),
        }
    }
}
