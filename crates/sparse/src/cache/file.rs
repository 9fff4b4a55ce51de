//! The file: a prefix, a header that says what lies where, and the bytes of matrices and vectors.
//!
//! ```text
//! 0   "RELUPACK"
//! 8   version of the layout      u32, little-endian
//! 12  1, as this machine writes it: numbers in the file are in its byte order
//! 16  length of the header       u64, little-endian
//! 24  checksum of the above and of the header, 32 bytes
//! 56  the header, JSON
//!     zeros up to a whole page, from which the header counts; then each span, page by page
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use memmap2::Mmap;
use rayon::prelude::*;
use relufy_model::ParamId;
use serde::{Deserialize, Serialize};

use super::origin::Origin;
use crate::matrix::{Matrix, anonymous_large, data_bytes};
use crate::{Error, Format, Result};

/// Counts up when what is written changes.
pub(super) const VERSION: u32 = 2;
pub(super) const MAGIC: &[u8; 8] = b"RELUPACK";
pub(super) const PREFIX: usize = 56;
/// Spans start at multiples of it.
pub(super) const PAGE: usize = 4096;
/// Bytes that one thread hashes at a time.
const PIECE: usize = 4 << 20;

/// What lies where.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    /// Whose weights these are.
    pub key: String,
    /// Where they come from.
    pub origin: Origin,
    /// Bytes after the header's last page.
    pub bytes: u64,
    pub matrices: Vec<MatrixEntry>,
    pub vectors: Vec<VectorEntry>,
}

/// A matrix.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MatrixEntry {
    pub name: String,
    pub format: Format,
    /// Rows, columns and parts.
    pub shape: (usize, usize, usize),
    pub data: Span,
    /// One a part, of [`Format::Int8`] only.
    pub scales: Vec<Span>,
}

/// A bias, or the weight of a norm: f32.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VectorEntry {
    pub name: String,
    pub data: Span,
}

/// Some bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Span {
    pub offset: u64,
    pub bytes: u64,
    /// Of its pieces' hashes.
    pub hash: String,
}

/// A file whose header was found to be right. What it holds is checked as it is taken.
pub(crate) struct PackedFile {
    map: Mmap,
    /// Where spans count from.
    start: usize,
    matrices: HashMap<String, MatrixEntry>,
    vectors: HashMap<String, Span>,
}

impl PackedFile {
    /// Opens a file and checks its header; `None` where there is none. The error is for people.
    pub fn open(path: &Path, key: &str) -> std::result::Result<Option<PackedFile>, String> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        if file.metadata().map_err(|error| error.to_string())?.len() < PREFIX as u64 {
            return Err("is shorter than its header".to_owned());
        }
        // SAFETY: such files are never changed in place: they are written under another name and
        // renamed, so what is mapped stays as it is even when one is replaced.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        PackedFile::check(map, key).map(Some)
    }

    fn check(map: Mmap, key: &str) -> std::result::Result<PackedFile, String> {
        let (start, header) = header(&map)?;
        if header.key != key {
            return Err("belongs to other weights".to_owned());
        }
        let expected = u64::try_from(start).ok().and_then(|start| start.checked_add(header.bytes));
        if expected != Some(map.len() as u64) {
            let expected = expected.unwrap_or(u64::MAX);
            return Err(format!("has {} bytes, expected {expected}", map.len()));
        }
        let Header { matrices, vectors, .. } = header;
        Ok(PackedFile {
            map,
            start,
            matrices: matrices.into_iter().map(|entry| (entry.name.clone(), entry)).collect(),
            vectors: vectors.into_iter().map(|entry| (entry.name, entry.data)).collect(),
        })
    }

    /// A matrix, in memory of its own.
    pub fn matrix(
        &self,
        name: String,
        format: Format,
        shape: (usize, usize, usize),
    ) -> Result<Matrix> {
        let refuse = |why: &str| Error::Decoder(format!("packed matrix `{name}` {why}"));
        let entry = self.matrices.get(&name).ok_or_else(|| refuse("is missing"))?;
        let (rows, _, parts) = shape;
        let row_scales = if format == Format::Int8 { parts } else { 0 };
        if (entry.format, entry.shape) != (format, shape) || entry.scales.len() != row_scales {
            return Err(refuse("has another format or shape"));
        }
        if entry.data.bytes != data_bytes(format, shape) as u64 {
            return Err(refuse("has another length"));
        }
        let from = self.bytes(&entry.data).ok_or_else(|| refuse("lies outside"))?;
        let mut data = anonymous_large(from.len())?;
        // Hashed while it is in a cache anyway.
        let pieces = data.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).map(|(to, from)| {
            to[..from.len()].copy_from_slice(from);
            blake3::hash(&to[..from.len()])
        });
        if joined(pieces.collect()) != entry.data.hash {
            return Err(refuse("is damaged: its checksum differs"));
        }
        let mut scales = Vec::new();
        for span in &entry.scales {
            let values = self.floats(span).filter(|values| values.len() == rows);
            scales.push(values.ok_or_else(|| refuse("is damaged: its scales differ"))?);
        }
        scales.resize(parts, Vec::new());
        Ok(Matrix::packed(name, format, shape, data, scales))
    }

    /// A vector; `None` where there is none.
    ///
    /// # Errors
    /// One that is damaged.
    pub fn vector(&self, id: ParamId) -> Result<Option<Vec<f32>>> {
        let name = format!("{id:?}");
        let Some(span) = self.vectors.get(&name) else { return Ok(None) };
        let damaged = || Error::Decoder(format!("packed vector `{name}` is damaged"));
        self.floats(span).ok_or_else(damaged).map(Some)
    }

    /// Numbers whose checksum is right.
    fn floats(&self, span: &Span) -> Option<Vec<f32>> {
        let bytes = self.bytes(span)?;
        if hash(bytes) != span.hash {
            return None;
        }
        bytemuck::try_cast_slice(bytes).ok().map(<[f32]>::to_vec)
    }

    /// Where a span lies; `None` where that is outside.
    fn bytes(&self, span: &Span) -> Option<&[u8]> {
        let from = self.start.checked_add(usize::try_from(span.offset).ok()?)?;
        self.map.get(from..from.checked_add(usize::try_from(span.bytes).ok()?)?)
    }
}

/// The header, and where the spans count from.
pub(super) fn header(map: &[u8]) -> std::result::Result<(usize, Header), String> {
    let (prefix, rest) = map.split_at_checked(PREFIX).ok_or("is shorter than its header")?;
    if !prefix.starts_with(MAGIC) {
        return Err("holds no packed weights".to_owned());
    }
    match version(prefix) {
        Some((VERSION, true)) => {}
        Some((VERSION, false)) | None => {
            return Err("was written on a machine with another byte order".to_owned());
        }
        Some((version, _)) => return Err(format!("has version {version}, expected {VERSION}")),
    }
    let length = u64::from_le_bytes(prefix[16..24].try_into().unwrap_or_default());
    let length = usize::try_from(length).ok().filter(|length| *length <= rest.len());
    let length = length.ok_or("ends within its header")?;
    let json = &rest[..length];
    if header_hash(&prefix[..24], json) != prefix[24..] {
        return Err("is damaged: the checksum of its header differs".to_owned());
    }
    let header = serde_json::from_slice(json).map_err(|error| format!("header: {error}"))?;
    Ok(((PREFIX + length).next_multiple_of(PAGE), header))
}

/// The version of the layout, and whether numbers are in this machine's byte order; `None` of a prefix
/// that is cut short.
pub(super) fn version(prefix: &[u8]) -> Option<(u32, bool)> {
    let word = |at: usize| prefix.get(at..at + 4).and_then(|word| <[u8; 4]>::try_from(word).ok());
    Some((u32::from_le_bytes(word(8)?), word(12)? == 1u32.to_ne_bytes()))
}

/// What stands for the prefix up to the checksum, and for the header.
pub(super) fn header_hash(prefix: &[u8], json: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(prefix).update(json).finalize().as_bytes()
}

/// The hash of some bytes' pieces, which are hashed in parallel.
pub(super) fn hash(bytes: &[u8]) -> String {
    joined(bytes.par_chunks(PIECE).map(blake3::hash).collect())
}

/// One hash of several.
fn joined(pieces: Vec<blake3::Hash>) -> String {
    let mut hasher = blake3::Hasher::new();
    pieces.iter().for_each(|piece| {
        hasher.update(piece.as_bytes());
    });
    hasher.finalize().to_hex().to_string()
}
