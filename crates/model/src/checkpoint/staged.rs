//! Folders and files that appear whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A folder that is filled under a temporary name and then renamed, so that a reader (or
/// a crash) never sees half of it. Dropped without [`StagedDir::commit`], it is removed.
#[derive(Debug)]
pub struct StagedDir {
    temporary: tempfile::TempDir,
    target: PathBuf,
}

/// Temporary folders of [`StagedDir`] begin with this, beside their target.
pub const STAGED_PREFIX: &str = ".relufy-partial-";

impl StagedDir {
    /// Begins a folder that will be `target`; missing parents are made.
    ///
    /// # Errors
    /// A target that exists, unless it is an empty folder.
    pub fn create(target: &Path) -> Result<StagedDir> {
        if occupied(target) {
            return Err(Error::OutputExists { path: target.to_owned() });
        }
        let parent = make_parent(target)?;
        let temporary = tempfile::Builder::new()
            .prefix(STAGED_PREFIX)
            .tempdir_in(parent)
            .map_err(Error::io(parent))?;
        Ok(StagedDir { temporary, target: target.to_owned() })
    }

    /// Where to write meanwhile.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Syncs every file and gives the folder its name.
    ///
    /// # Errors
    /// A full disk, or a target that appeared meanwhile.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.temporary.path())?;
        let StagedDir { temporary, target } = self;
        if occupied(&target) {
            return Err(Error::OutputExists { path: target });
        }
        set_mode(temporary.path(), 0o755)?;
        fs::rename(temporary.path(), &target).map_err(Error::io(&target))?;
        // The folder moved away: there is nothing left to remove.
        let _moved = temporary.keep();
        sync_dir(parent(&target))
    }
}

/// Writes a file whole or not at all; missing parents are made. A link is followed, and a
/// device or pipe (`/dev/stdout`) is written to rather than replaced.
///
/// # Errors
/// A full disk, and whatever else the system says.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let found = fs::metadata(path).ok();
    if found.as_ref().is_some_and(|found| !found.is_file() && !found.is_dir()) {
        return fs::write(path, bytes).map_err(Error::io(path));
    }
    let target = match found {
        Some(_) => path.canonicalize().map_err(Error::io(path))?,
        None => path.to_owned(),
    };
    let parent = make_parent(&target)?;
    let mut file = tempfile::Builder::new()
        .prefix(STAGED_PREFIX)
        .tempfile_in(parent)
        .map_err(Error::io(parent))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    set_mode(file.path(), 0o644)?;
    file.persist(&target)
        .map_err(|error| Error::Io { path: path.to_owned(), source: error.error })?;
    sync_dir(parent)
}

fn occupied(target: &Path) -> bool {
    match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => target.symlink_metadata().is_ok(),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The folder that a path lies in, made where it is missing.
fn make_parent(path: &Path) -> Result<&Path> {
    let parent = parent(path);
    if parent.exists() && !parent.is_dir() {
        let source = std::io::ErrorKind::NotADirectory.into();
        return Err(Error::Io { path: parent.to_owned(), source });
    }
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    Ok(parent)
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io(&path))?;
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))
}

/// Temporary files and folders are their owner's alone, which is not what a person expects
/// of an output.
#[cfg(unix)]
pub(super) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io(path))
}

#[cfg(not(unix))]
pub(super) fn set_mode(_path: &Path, _mode: u32) -> Result<()> {
    Ok(())
}
