//! Files that are being written. Their writer holds a lock, which the system takes back when it ends,
//! however it ends: what is not locked is the leftover of an interrupted write.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::path::Path;

use tempfile::NamedTempFile;

/// Names of such files begin with this, and of no others in the folder.
pub(super) const PREFIX: &str = ".relufy-partial-packed-";

/// So often is a file begun that somebody takes for a leftover at once.
const ATTEMPTS: usize = 100;

/// Begins a file. Where the system has no locks, nobody takes it for a leftover either.
pub(super) fn begin(folder: &Path) -> io::Result<NamedTempFile> {
    for _ in 0..ATTEMPTS {
        let file = tempfile::Builder::new().prefix(PREFIX).tempfile_in(folder)?;
        match file.as_file().lock() {
            // Between its creation and the lock it looked like a leftover.
            Ok(()) if !is_at(file.as_file(), file.path()) => {}
            _ => return Ok(file),
        }
    }
    Err(io::Error::other("the files that are begun disappear"))
}

/// Whether nobody is writing a file any more; the file, locked. `None` for one that is written, or
/// whose name is gone.
///
/// # Errors
/// A file that may not be opened; a system without locks.
pub(super) fn leftover(path: &Path) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        // Its writer may have ended by giving it its final name.
        Ok(()) => Ok(is_at(&file, path).then_some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes a leftover; whether it was one.
///
/// # Errors
/// As [`leftover`]; a file that may not be removed.
pub(super) fn remove(path: &Path) -> io::Result<bool> {
    // The lock is held until the name is gone.
    let Some(_locked) = leftover(path)? else { return Ok(false) };
    fs::remove_file(path).map(|()| true)
}

/// Removes all leftovers of a folder that can be removed.
pub(super) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_partial(&entry.file_name()) {
            // One that resists is listed by whoever asks.
            let _ = remove(&entry.path());
        }
    }
}

pub(super) fn is_partial(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(PREFIX))
}

/// Whether an open file is the one that a name, which is no link, stands for.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => same(&file, &named),
        _ => false,
    }
}

#[cfg(unix)]
fn same(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Without numbers of files, the name must do: they are random.
#[cfg(not(unix))]
fn same(_: &Metadata, named: &Metadata) -> bool {
    named.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_writes_is_a_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let writing = begin(folder.path()).unwrap();
        let dead = folder.path().join(format!("{PREFIX}dead"));
        let other = folder.path().join(".relufy-partial-other");
        for path in [&dead, &other] {
            fs::write(path, "half").unwrap();
        }
        assert!(!remove(writing.path()).unwrap() && leftover(&dead).unwrap().is_some());
        sweep(folder.path());
        assert!(writing.path().exists() && other.exists() && !dead.exists());
        // Finished or given up, it is none.
        let path = writing.path().to_owned();
        let last = writing.persist(folder.path().join("x.packed")).unwrap();
        assert!(!remove(&path).unwrap());
        drop(last);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn links_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("mine"), folder.path().join(format!("{PREFIX}x")));
        fs::write(&target, "mine").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        sweep(folder.path());
        assert!(!remove(&link).unwrap());
        assert!(target.exists() && link.symlink_metadata().is_ok());
    }

    #[test]
    fn writers_and_sweepers_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    sweep(folder.path());
                }
            });
            for n in 0..200 {
                let to = folder.path().join(format!("{n}.packed"));
                begin(folder.path()).unwrap().persist(&to).unwrap();
                assert!(to.exists());
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 200);
    }
}
