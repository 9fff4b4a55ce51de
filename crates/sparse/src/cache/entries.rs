//! What lies in a folder with packed weights, and what of it is of no use any more.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::file::{Header, MAGIC, PREFIX, VERSION, header, version};
use super::origin::{self, Fate, Origin};
use super::{PackedCache, partial};
use crate::Format;

/// A file of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PackedEntry {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Hub id or folder name of the model; `None` where the file does not say.
    pub model: Option<String>,
    /// How the weights are stored; `None` where the file does not say.
    pub format: Option<Format>,
    /// Whether it is of use.
    pub state: PackedState,
}

/// Whether a file is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PackedState {
    /// The model's weights are what they were.
    Current,
    /// A process is writing it.
    Writing,
    /// What a process left behind that was interrupted while it wrote.
    Interrupted,
    /// The model's weights are others now.
    Changed,
    /// The model's weights are not there any more.
    Gone,
    /// Another version of the program made it, or another kind of machine.
    OtherVersion,
    /// It is cut short, or its header is wrong.
    Damaged,
}

impl PackedState {
    /// Whether nobody would miss the file: what is needed is packed again.
    pub fn is_useless(self) -> bool {
        !matches!(self, PackedState::Current | PackedState::Writing)
    }
}

impl PackedCache {
    /// The files of the cache, by name; none where there is no folder. What else lies in the folder is
    /// left out. Weight files that seem to have changed are read.
    ///
    /// # Errors
    /// A folder or file that cannot be read.
    pub fn entries(&self) -> io::Result<Vec<PackedEntry>> {
        let found = match fs::read_dir(&self.dir) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut entries = Vec::new();
        for file in found {
            let file = file?;
            if file.file_type()?.is_file() {
                match entry(&file.path()) {
                    Ok(entry) => entries.extend(entry),
                    // Removed or finished meanwhile.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Removes a file of the cache; whether it was there and nobody was writing it. Processes that
    /// decode with it go on.
    ///
    /// # Errors
    /// A file that may not be removed.
    pub fn remove(&self, entry: &PackedEntry) -> io::Result<bool> {
        match entry.state {
            PackedState::Writing => Ok(false),
            PackedState::Interrupted => partial::remove(&entry.path),
            _ => match fs::remove_file(&entry.path) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            },
        }
    }

    /// Files whose place in this cache `origin` takes: of the same weight files with another content,
    /// and of the same model by another version of the program.
    pub(super) fn superseded(&self, origin: &Origin) -> Vec<PackedEntry> {
        let superseded = |path: &Path| -> io::Result<Option<PackedEntry>> {
            let Some(read) = Peek::new(path)? else { return Ok(None) };
            let state = match read.header() {
                Ok(header) if origin.weights.replace(&header.origin.weights) => {
                    PackedState::Changed
                }
                Ok(header)
                    if header.origin.relufy != origin.relufy
                        && header.origin.model == origin.model =>
                {
                    PackedState::OtherVersion
                }
                _ => return Ok(None),
            };
            Ok(Some(read.entry(path, state)))
        };
        let found = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let files = found.filter(|file| file.file_type().is_ok_and(|kind| kind.is_file()));
        files.filter_map(|file| superseded(&file.path()).ok().flatten()).collect()
    }
}

/// What a file is; `None` for one that is not the cache's.
fn entry(path: &Path) -> io::Result<Option<PackedEntry>> {
    if path.file_name().is_some_and(partial::is_partial) {
        let bytes = fs::metadata(path)?.len();
        let state = match partial::leftover(path) {
            Ok(Some(_)) => PackedState::Interrupted,
            // Without locks nobody knows.
            Ok(None) | Err(_) => PackedState::Writing,
        };
        // Finished or given up while we looked.
        return Ok(path.exists().then(|| PackedEntry {
            path: path.to_owned(),
            bytes,
            model: None,
            format: None,
            state,
        }));
    }
    let Some(read) = Peek::new(path)? else { return Ok(None) };
    let state = read.state();
    Ok(Some(read.entry(path, state)))
}

/// The beginning of a packed file.
struct Peek {
    bytes: u64,
    /// Prefix and header, or what there is of them.
    start: Vec<u8>,
}

impl Peek {
    /// Reads it; `None` where the file holds no packed weights.
    fn new(path: &Path) -> io::Result<Option<Peek>> {
        if path.extension().is_none_or(|extension| extension != "packed") {
            return Ok(None);
        }
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        let mut start = Vec::new();
        (&file).take(PREFIX as u64).read_to_end(&mut start)?;
        if !start.starts_with(MAGIC) {
            return Ok(None);
        }
        if let Some(length) = start.get(16..24).and_then(|length| length.try_into().ok()) {
            (&file).take(u64::from_le_bytes(length)).read_to_end(&mut start)?;
        }
        Ok(Some(Peek { bytes, start }))
    }

    fn header(&self) -> Result<Header, String> {
        header(&self.start).map(|(_, header)| header)
    }

    fn state(&self) -> PackedState {
        if version(&self.start).is_some_and(|found| found != (VERSION, true)) {
            return PackedState::OtherVersion;
        }
        let (start, header) = match header(&self.start) {
            Ok((start, header)) => (start as u64, header),
            Err(_) => return PackedState::Damaged,
        };
        if start.checked_add(header.bytes) != Some(self.bytes) {
            return PackedState::Damaged;
        }
        if header.origin.relufy != origin::version() {
            return PackedState::OtherVersion;
        }
        match header.origin.weights.fate() {
            Fate::Same => PackedState::Current,
            Fate::Changed => PackedState::Changed,
            Fate::Gone => PackedState::Gone,
        }
    }

    fn entry(&self, path: &Path, state: PackedState) -> PackedEntry {
        let origin = self.header().ok().map(|header| header.origin);
        PackedEntry {
            path: path.to_owned(),
            bytes: self.bytes,
            model: origin.as_ref().map(|origin| origin.model.clone()),
            format: origin.map(|origin| origin.format),
            state,
        }
    }
}
