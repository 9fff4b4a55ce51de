//! One repository of the hub at one commit, or what the cache holds of it.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{Hub, HubSettings};
use crate::{Error, Progress, Result};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
        }
    }
}

/// `org/name` at a revision.
#[derive(Clone, Debug)]
pub(super) struct RepoId {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) revision: String,
}

impl RepoId {
    /// From `[org/]name[@revision]`.
    pub(super) fn parse(kind: Kind, reference: &str) -> Result<Self> {
        let (id, revision) = match reference.split_once('@') {
            Some((id, revision)) => (id, revision),
            None => (reference, "main"),
        };
        let is_name = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        // Hub revisions may hold slashes (refs/convert/parquet), but must stay inside the cache.
        let revision_ok = !revision.is_empty()
            && revision.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
            && revision.chars().all(|c| c.is_ascii_graphic() && !"\\?#%".contains(c));
        if id.split('/').count() > 2 || !id.split('/').all(is_name) || !revision_ok {
            return Err(Error::BadReference { reference: reference.to_owned() });
        }
        Ok(RepoId { kind, id: id.to_owned(), revision: revision.to_owned() })
    }

    pub(super) fn dataset(repo: &str, revision: Option<&str>) -> Result<Self> {
        match revision {
            Some(revision) => Self::parse(Kind::Dataset, &format!("{repo}@{revision}")),
            None => Self::parse(Kind::Dataset, repo),
        }
    }

    fn at(&self, revision: &str) -> Repo {
        let kind = match self.kind {
            Kind::Model => RepoType::Model,
            Kind::Dataset => RepoType::Dataset,
        };
        Repo::with_revision(self.id.clone(), kind, revision.to_owned())
    }

    fn cache_folder(&self, settings: &HubSettings) -> PathBuf {
        settings.cache.join(self.at(&self.revision).folder_name())
    }
}

/// Where a repository's files come from.
pub(super) enum Snapshot {
    /// The hub answered.
    Remote(Box<Remote>),
    /// The hub was not asked or did not answer.
    Cached { folder: PathBuf, commit: String, why: String },
}

/// A repository at the commit that the hub named; files come as they are asked for.
pub(super) struct Remote {
    id: RepoId,
    commit: String,
    files: Vec<String>,
    folder: PathBuf,
    api: Api,
    repo: ApiRepo,
    cache: Cache,
}

impl Hub {
    /// Asks the hub which commit a revision is; without a hub, asks the cache.
    pub(super) fn snapshot(&self, id: &RepoId) -> Result<Snapshot> {
        let settings = self.settings();
        if settings.offline {
            return cached(settings, id, "HF_HUB_OFFLINE forbids asking the hub".to_owned());
        }
        match Remote::open(settings, id) {
            Ok(remote) => Ok(Snapshot::Remote(Box::new(remote))),
            Err(error) => match status(&error) {
                // The hub answers 401 for what does not exist, too.
                Some(code @ (401 | 403 | 404)) => Err(Error::UnknownRepository {
                    endpoint: settings.endpoint.clone(),
                    kind: id.kind.name(),
                    id: id.id.clone(),
                    revision: id.revision.clone(),
                    why: format!("status {code}"),
                }),
                _ => {
                    let why = format!("{} does not answer: {error}", settings.endpoint);
                    let snapshot = cached(settings, id, why.clone())?;
                    tracing::warn!("{why}; using the cached copy of {}", id.id);
                    Ok(snapshot)
                }
            },
        }
    }
}

/// The cached snapshot of a revision: `refs/REVISION` names the commit, or the revision
/// is a commit itself.
fn cached(settings: &HubSettings, id: &RepoId, why: String) -> Result<Snapshot> {
    let root = id.cache_folder(settings);
    let commit = std::fs::read_to_string(root.join("refs").join(&id.revision))
        .map_or_else(|_| id.revision.clone(), |commit| commit.trim().to_owned());
    let folder = root.join("snapshots").join(&commit);
    if plain_path(&commit).is_some() && folder.is_dir() {
        return Ok(Snapshot::Cached { folder, commit, why });
    }
    Err(Error::NotCached {
        kind: id.kind.name(),
        id: id.id.clone(),
        revision: id.revision.clone(),
        cache: settings.cache.clone(),
        why,
    })
}

impl Remote {
    fn open(settings: &HubSettings, id: &RepoId) -> std::result::Result<Self, ApiError> {
        let cache = Cache::new(settings.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_user_agent("relufy", env!("CARGO_PKG_VERSION"))
            .build()?;
        let info = api.repo(id.at(&id.revision)).info()?;
        let mut files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        files.sort();
        // All files of one call come from one commit, even if the branch moves meanwhile.
        let repo = api.repo(id.at(&info.sha));
        let folder = id.cache_folder(settings).join("snapshots").join(&info.sha);
        Ok(Remote { id: id.clone(), commit: info.sha, files, folder, api, repo, cache })
    }

    /// Paths of all files, sorted.
    pub(super) fn files(&self) -> &[String] {
        &self.files
    }

    /// The commit's hash.
    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    /// Where the fetched files lie.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The local copy of a file, downloaded if the cache does not hold it.
    pub(super) fn fetch(&self, file: &str, progress: &dyn Progress) -> Result<PathBuf> {
        let fail =
            |why: String| Error::Download { id: self.id.id.clone(), file: file.to_owned(), why };
        let relative = plain_path(file).ok_or_else(|| fail("is not a path".to_owned()))?;
        let local = self.folder.join(relative);
        if !local.exists() {
            if self.files.binary_search_by(|f| f.as_str().cmp(file)).is_err() {
                return Err(fail(format!("there is no such file at commit {}", self.commit)));
            }
            self.download(file, &local, progress).map_err(|error| {
                fail(match error {
                    ApiError::LockAcquisition(_) => "another process is downloading it".to_owned(),
                    error => error.to_string(),
                })
            })?;
            if !local.exists() {
                return Err(fail(format!("the hub sent another commit than {}", self.commit)));
            }
        }
        // So that the name is found again offline.
        let reference = self.cache.repo(self.id.at(&self.id.revision));
        reference.create_ref(&self.commit).map_err(|e| Error::io(&self.folder, e))?;
        Ok(local)
    }

    /// `hf-hub` neither checks how much arrived nor survives a finished partial file.
    fn download(
        &self,
        file: &str,
        local: &Path,
        progress: &dyn Progress,
    ) -> std::result::Result<(), ApiError> {
        let metadata = self.api.metadata(&self.repo.url(file))?;
        let size = metadata.size() as u64;
        let blob = self.cache.repo(self.id.at(&self.commit)).blob_path(metadata.etag());
        let part = blob.with_extension("part");
        if part.metadata().is_ok_and(|part| part.len() >= size) {
            std::fs::remove_file(&part)?;
        }
        self.repo.download_with_progress(file, Watch { progress, started: false })?;
        let found = blob.metadata()?.len();
        if found != size {
            std::fs::remove_file(&blob)?;
            if local.symlink_metadata().is_ok() {
                std::fs::remove_file(local)?;
            }
            return Err(ApiError::IoError(std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                format!("{found} of {size} bytes arrived"),
            )));
        }
        Ok(())
    }
}

/// Our progress in `hf-hub`'s terms.
struct Watch<'a> {
    progress: &'a dyn Progress,
    started: bool,
}

impl hf_hub::api::Progress for Watch<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        // Called twice for each download.
        if !self.started {
            self.progress.start(filename, Some(size as u64));
            self.started = true;
        }
    }

    fn update(&mut self, size: usize) {
        self.progress.advance(size as u64);
    }

    fn finish(&mut self) {
        self.progress.finish();
    }
}

/// The HTTP status that an error tells of.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Some(*code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// A path that stays where it is joined: no root, no `..`.
pub(super) fn plain_path(path: &str) -> Option<&Path> {
    let path = Path::new(path);
    let plain = path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

/// All files under a folder, as paths from there with `/`, sorted.
pub(super) fn walk(folder: &Path) -> Result<Vec<String>> {
    fn enter(folder: &Path, prefix: &str, found: &mut Vec<String>) -> Result<()> {
        for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
            let entry = entry.map_err(|e| Error::io(folder, e))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                enter(&entry.path(), &format!("{name}/"), found)?;
            } else {
                found.push(name);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    enter(folder, "", &mut found)?;
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let id = RepoId::parse(Kind::Model, "org/na.me-1@refs/pr/3").unwrap();
        assert_eq!((id.id.as_str(), id.revision.as_str()), ("org/na.me-1", "refs/pr/3"));
        assert_eq!(RepoId::parse(Kind::Model, "gpt2").unwrap().revision, "main");
        for bad in ["", "a/b/c", "/a/b", "./a", "../a", "a/..", "a b", "a/b@", "a@../x", "a@x?y"] {
            assert!(RepoId::parse(Kind::Model, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_stay_inside() {
        assert!(plain_path("a/b.json").is_some());
        for bad in ["", "/a", "../a", "a/../b", "./a"] {
            assert!(plain_path(bad).is_none(), "{bad}");
        }
    }
}
