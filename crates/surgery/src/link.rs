//! Weight files in a second folder, without copying their bytes where that can be avoided.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use relufy_data::Progress;
use relufy_model::Error;
use serde::Serialize;

use crate::Result;

/// How a weight file came into the new folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Linked {
    /// Shares the blocks, not the file: a change of one does not reach the other.
    Reflink,
    /// One file with two names: whoever overwrites it in place changes both.
    HardLink,
    /// A copy.
    Copy,
}

/// Makes `target` hold what `source` holds: by reflink, or else by hard link, or else (to
/// another file system) by copying. A symbolic link, as the hub's cache is made of, is
/// followed first: the link itself would lead nowhere from another folder.
pub(crate) fn link_or_copy(
    source: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<Linked> {
    let source = source.canonicalize().map_err(Error::io(source))?;
    if reflink_copy::reflink(&source, target).is_ok() {
        return Ok(Linked::Reflink);
    }
    // What a failed attempt may have left behind.
    if target.exists() {
        fs::remove_file(target).map_err(Error::io(target))?;
    }
    if fs::hard_link(&source, target).is_ok() {
        return Ok(Linked::HardLink);
    }
    copy(&source, target, progress)?;
    Ok(Linked::Copy)
}

/// Copies the bytes, not the permissions: a read-only source must not make a read-only copy.
fn copy(source: &Path, target: &Path, progress: &dyn Progress) -> Result<()> {
    let mut from = File::open(source).map_err(Error::io(source))?;
    let total = from.metadata().map_err(Error::io(source))?.len();
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let mut to = File::create_new(target).map_err(Error::io(target))?;
    progress.start(&format!("copying {name}"), Some(total));
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer).map_err(Error::io(source))? {
            0 => break,
            n => {
                to.write_all(&buffer[..n]).map_err(Error::io(target))?;
                progress.advance(n as u64);
            }
        }
    }
    progress.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use relufy_data::Silent;

    #[test]
    fn a_link_of_the_hubs_cache_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, link) = (dir.path().join("blob"), dir.path().join("model.safetensors"));
        fs::write(&blob, b"weights").unwrap();
        std::os::unix::fs::symlink("blob", &link).unwrap();
        let folder = dir.path().join("elsewhere");
        fs::create_dir(&folder).unwrap();
        let target = folder.join("model.safetensors");
        link_or_copy(&link, &target, &Silent).unwrap();
        assert!(!target.is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"weights");
    }

    #[test]
    fn a_copy_holds_the_same_bytes_and_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(&source, &bytes).unwrap();
        let mut mode = fs::metadata(&source).unwrap().permissions();
        mode.set_readonly(true);
        fs::set_permissions(&source, mode).unwrap();
        copy(&source, &target, &Silent).unwrap();
        assert_eq!(fs::read(&target).unwrap(), bytes);
        assert!(!fs::metadata(&target).unwrap().permissions().readonly());
        assert!(copy(&source, &target, &Silent).is_err());
    }
}
