//! Which files a source's path means.

use std::path::{Path, PathBuf};

use super::SourceConfig;
use super::open::is_readable;
use crate::{Error, Hub, Progress, Result};

/// The marker of a path on the hub.
const HUB: &str = "hub://";

/// The files that `source.path` means: itself, the matches of a glob, all readable files of
/// a folder and its subfolders, or files of a dataset repository (which are fetched). In
/// the order of their paths.
///
/// # Errors
/// [`Error::BadFile`] for a path that does not exist and for a glob or folder without a
/// file, and those of [`Hub::dataset_file`].
pub fn files(source: &SourceConfig, hub: &Hub, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
    let given = source.path.as_str();
    if let Some(rest) = given.strip_prefix(HUB) {
        return hub_files(rest, source, hub, progress);
    }
    let path = Path::new(given);
    let any_format = source.format.is_some();
    let mut found = Vec::new();
    if path.is_dir() {
        enter(path, any_format, &mut found)?;
    } else if path.exists() {
        found.push(path.to_path_buf());
    } else if given.contains(['*', '?', '[']) {
        let matches = glob::glob(given).map_err(|e| Error::config("path", e))?;
        for entry in matches {
            let entry =
                entry.map_err(|e| Error::Io { path: e.path().to_path_buf(), source: e.into() })?;
            if entry.is_file() {
                found.push(entry);
            }
        }
    } else {
        return Err(Error::bad_file(path, "there is no such file or folder"));
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::bad_file(path, "no corpus file (.txt, .jsonl, .parquet) is there"));
    }
    Ok(found)
}

/// All files below a folder; hidden ones and those of unknown format are passed over.
fn enter(folder: &Path, any_format: bool, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| Error::io(&path, e))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // A link to a folder is not followed: it may lead in a circle.
        if kind.is_dir() {
            enter(&path, any_format, found)?;
        } else if path.is_file() && (any_format || is_readable(&path)) {
            found.push(path);
        }
    }
    Ok(())
}

/// `org/name[@revision]/path`, where the path is a file, a glob or a folder.
fn hub_files(
    rest: &str,
    source: &SourceConfig,
    hub: &Hub,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    let bad = || Error::config("path", format!("`{HUB}{rest}` is not {HUB}org/name/path"));
    let (org, rest_of) = rest.split_once('/').ok_or_else(bad)?;
    let (name, path) = rest_of.split_once('/').ok_or_else(bad)?;
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (name, None),
    };
    let repo = format!("{org}/{name}");
    let path = path.trim_end_matches('/');
    let listing = hub.dataset_listing(&repo, revision)?;
    let pattern = glob::Pattern::new(path).map_err(|e| Error::config("path", e))?;
    let inside = format!("{path}/");
    let wanted: Vec<&String> = listing
        .iter()
        .filter(|file| {
            let readable = source.format.is_some() || is_readable(Path::new(file));
            *file == path || (readable && (pattern.matches(file) || file.starts_with(&inside)))
        })
        .collect();
    if wanted.is_empty() {
        return Err(Error::EmptyCorpus { what: source.path.clone() });
    }
    wanted.into_iter().map(|file| hub.dataset_file(&repo, revision, file, progress)).collect()
}
