//! Token ids on disk: one memory-mapped file a source, tokenised once.
//!
//! The name of a file is the hash of all that its content depends on, so it never goes
//! stale; the file is written under another name and renamed, so it is never half there;
//! and its checksum is compared at every opening, so a damaged one is made anew.
//!
//! Layout, little-endian: a header of [`HEADER`] bytes, the ids (u16 where the vocabulary
//! allows, else u32; padded to 8 bytes), an `(end, hash)` pair of u64 for each document,
//! and, where anything is masked, a bit for each id that tells whether it is learnt.

mod build;
mod write;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

pub(crate) use build::open_or_build;

/// Bytes before the first id.
const HEADER: usize = 128;
const MAGIC: &[u8; 8] = b"RELUFYTK";
/// Counts up with every change of the layout or of how text becomes ids.
const VERSION: u32 = 1;
const FLAG_MASK: u64 = 1;
/// Header bytes that the checksum covers; it stands right behind them.
const COVERED: usize = 72;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// Bytes of an id: 2 or 4.
    width: usize,
    tokens: u64,
    documents: u64,
    masked: bool,
    key: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; COVERED] {
        let mut bytes = [0; COVERED];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.documents.to_le_bytes());
        let flags = if self.masked { FLAG_MASK } else { 0 };
        bytes[32..40].copy_from_slice(&flags.to_le_bytes());
        bytes[40..72].copy_from_slice(&self.key);
        bytes
    }

    /// `Err` says what is wrong.
    fn decode(bytes: &[u8]) -> std::result::Result<Self, String> {
        let bytes: &[u8; COVERED] = bytes
            .get(..COVERED)
            .and_then(|b| b.try_into().ok())
            .ok_or("is shorter than its header")?;
        if &bytes[..8] != MAGIC {
            return Err("is not a token cache".to_owned());
        }
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        if u32_at(8) != VERSION {
            return Err(format!("has version {}, expected {VERSION}", u32_at(8)));
        }
        let width = match u32_at(12) {
            2 => 2,
            4 => 4,
            other => return Err(format!("has ids of {other} bytes")),
        };
        let mut key = [0; 32];
        key.copy_from_slice(&bytes[40..72]);
        let flags = u64_at(bytes, 32);
        if flags & !FLAG_MASK != 0 {
            return Err(format!("has unknown flags {flags:#x}"));
        }
        Ok(Header {
            width,
            tokens: u64_at(bytes, 16),
            documents: u64_at(bytes, 24),
            masked: flags & FLAG_MASK != 0,
            key,
        })
    }

    /// Where the document table begins, where the mask begins, and where the file ends;
    /// `None` where that is past what a file can be.
    fn offsets(&self) -> Option<(usize, usize, usize)> {
        let tokens = usize::try_from(self.tokens).ok()?;
        let documents = usize::try_from(self.documents).ok()?;
        let table =
            HEADER.checked_add(tokens.checked_mul(self.width)?)?.checked_next_multiple_of(8)?;
        let mask = table.checked_add(documents.checked_mul(16)?)?;
        let end = mask.checked_add(if self.masked { tokens.div_ceil(8) } else { 0 })?;
        Some((table, mask, end))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    if let Some(found) = bytes.get(at..at + 8) {
        word.copy_from_slice(found);
    }
    u64::from_le_bytes(word)
}

/// The checksum of a file: of its payload, then of its header.
fn checksum(payload: blake3::Hasher, header: &[u8; COVERED]) -> [u8; 32] {
    let mut payload = payload;
    payload.update(header);
    *payload.finalize().as_bytes()
}

/// The tokens of one source.
pub(crate) struct TokenCache {
    map: Mmap,
    header: Header,
    table: usize,
    mask: usize,
    checksum: [u8; 32],
}

impl std::fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenCache").field("header", &self.header).finish_non_exhaustive()
    }
}

impl TokenCache {
    /// Opens and checks a whole file. `Ok(Err(why))`: it is not what it should be.
    fn open(path: &Path, key: &[u8; 32]) -> Result<std::result::Result<Self, String>> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        if file.metadata().map_err(|e| Error::io(path, e))?.len() < HEADER as u64 {
            return Ok(Err("is shorter than its header".to_owned()));
        }
        // SAFETY: cache files are never changed in place: they are written under another
        // name and renamed, so what is mapped stays as it is even when one is replaced.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self::check(map, key))
    }

    fn check(map: Mmap, key: &[u8; 32]) -> std::result::Result<Self, String> {
        let header = Header::decode(&map)?;
        if header.key != *key {
            return Err("belongs to another source".to_owned());
        }
        let (table, mask, end) = header.offsets().ok_or("has impossible lengths")?;
        if map.len() != end {
            return Err(format!("has {} bytes, expected {end}", map.len()));
        }
        let mut payload = blake3::Hasher::new();
        payload.update(&map[HEADER..]);
        let found = checksum(payload, &header.encode());
        if map[COVERED..COVERED + 32] != found {
            return Err("has a wrong checksum".to_owned());
        }
        Ok(TokenCache { map, header, table, mask, checksum: found })
    }

    /// Documents in all.
    pub(crate) fn documents(&self) -> usize {
        self.header.documents as usize
    }

    /// What the content hashes to.
    pub(crate) fn checksum(&self) -> &[u8; 32] {
        &self.checksum
    }

    /// Where a document's ids stand; empty for one that does not exist.
    pub(crate) fn document(&self, index: usize) -> Range<usize> {
        if index >= self.documents() {
            return 0..0;
        }
        let end = |index: usize| u64_at(&self.map, self.table + 16 * index) as usize;
        let start = if index == 0 { 0 } else { end(index - 1) };
        start..end(index)
    }

    /// A document's hash: equal for equal ids.
    pub(crate) fn document_hash(&self, index: usize) -> u64 {
        u64_at(&self.map, self.table + 16 * index + 8)
    }

    /// The ids at a range, which must lie within a document.
    pub(crate) fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let width = self.header.width;
        let bytes = self.map[..self.table]
            .get(HEADER + range.start * width..HEADER + range.end * width)
            .unwrap_or_default();
        bytes.chunks_exact(width).map(|id| match id {
            [a, b] => u32::from(u16::from_le_bytes([*a, *b])),
            [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        })
    }

    /// Whether an id is learnt, that is, may be a target.
    pub(crate) fn is_learnt(&self, index: usize) -> bool {
        !self.header.masked
            || self.map.get(self.mask + index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }
}

/// Where caches are kept unless a config says so: `$XDG_CACHE_HOME/relufy`, else `~/.cache/relufy`.
///
/// # Errors
/// Where no variable names a cache and there is no home folder.
pub fn default_dir() -> Result<PathBuf> {
    std::env::var_os("XDG_CACHE_HOME")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .map(|dir| dir.join("relufy"))
        .ok_or_else(|| Error::config("cache_dir", "is not set, and there is no home folder"))
}
