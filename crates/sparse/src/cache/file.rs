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
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use relufy_model::ParamId;
use serde::{Deserialize, Serialize};

use crate::matrix::{Matrix, Memory, data_bytes};
use crate::{Error, Format, Result};

/// Counts up when what is written changes.
pub(super) const VERSION: u32 = 1;
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

/// A file that was found to be whole and right.
pub(crate) struct PackedFile {
    map: Arc<Mmap>,
    /// Where spans count from.
    start: usize,
    matrices: HashMap<String, MatrixEntry>,
    vectors: HashMap<String, Span>,
}

impl PackedFile {
    /// Opens a file and checks every byte; `None` where there is none. The error is for people.
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
        #[cfg(target_os = "linux")]
        // A wish: where files have no huge pages nothing is lost.
        let _ = map.advise(memmap2::Advice::HugePage);
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
        let spans = || {
            let matrices = header.matrices.iter().flat_map(|matrix| {
                let all = std::iter::once(&matrix.data).chain(&matrix.scales);
                all.map(|span| (&matrix.name, span))
            });
            matrices.chain(header.vectors.iter().map(|vector| (&vector.name, &vector.data)))
        };
        for (name, span) in spans() {
            let bytes = range(span, start).and_then(|range| map.get(range));
            let bytes = bytes.ok_or_else(|| format!("`{name}` lies outside"))?;
            if hash(bytes) != span.hash {
                return Err(format!("is damaged: the checksum of `{name}` differs"));
            }
        }
        let Header { matrices, vectors, .. } = header;
        Ok(PackedFile {
            map: Arc::new(map),
            start,
            matrices: matrices.into_iter().map(|entry| (entry.name.clone(), entry)).collect(),
            vectors: vectors.into_iter().map(|entry| (entry.name, entry.data)).collect(),
        })
    }

    /// A matrix.
    pub fn matrix(
        &self,
        name: String,
        format: Format,
        shape: (usize, usize, usize),
    ) -> Result<Matrix> {
        let refuse = |why: &str| Err(Error::Decoder(format!("packed matrix `{name}` {why}")));
        let Some(entry) = self.matrices.get(&name) else { return refuse("is missing") };
        let (rows, _, parts) = shape;
        let (scales, row_scales) = if format == Format::Int8 { (parts, rows) } else { (0, 0) };
        if (entry.format, entry.shape) != (format, shape) || entry.scales.len() != scales {
            return refuse("has another format or shape");
        }
        let Some(range) = range(&entry.data, self.start) else { return refuse("lies outside") };
        if range.len() != data_bytes(format, shape) {
            return refuse("has another length");
        }
        let mut scales = Vec::new();
        for span in &entry.scales {
            match self.floats(span) {
                Some(values) if values.len() == row_scales => scales.push(values),
                _ => return refuse("has other scales"),
            }
        }
        scales.resize(parts, Vec::new());
        Ok(Matrix::packed(name, format, shape, Memory::File(self.map.clone(), range), scales))
    }

    /// A vector; `None` where there is none.
    pub fn vector(&self, id: ParamId) -> Option<Vec<f32>> {
        self.floats(self.vectors.get(&format!("{id:?}"))?)
    }

    fn floats(&self, span: &Span) -> Option<Vec<f32>> {
        let bytes = self.map.get(range(span, self.start)?)?;
        bytemuck::try_cast_slice(bytes).ok().map(<[f32]>::to_vec)
    }
}

/// The header, and where the spans count from.
fn header(map: &[u8]) -> std::result::Result<(usize, Header), String> {
    let (prefix, rest) = map.split_at_checked(PREFIX).ok_or("is shorter than its header")?;
    if !prefix.starts_with(MAGIC) {
        return Err("holds no packed weights".to_owned());
    }
    let word = |at: usize| <[u8; 4]>::try_from(&prefix[at..at + 4]).unwrap_or_default();
    let version = u32::from_le_bytes(word(8));
    if version != VERSION {
        return Err(format!("has version {version}, expected {VERSION}"));
    }
    if word(12) != 1u32.to_ne_bytes() {
        return Err("was written on a machine with another byte order".to_owned());
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

/// Where a span lies in the file.
fn range(span: &Span, start: usize) -> Option<Range<usize>> {
    let from = start.checked_add(usize::try_from(span.offset).ok()?)?;
    Some(from..from.checked_add(usize::try_from(span.bytes).ok()?)?)
}

/// What stands for the prefix up to the checksum, and for the header.
pub(super) fn header_hash(prefix: &[u8], json: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(prefix).update(json).finalize().as_bytes()
}

/// The hash of some bytes' pieces, which are hashed in parallel.
pub(super) fn hash(bytes: &[u8]) -> String {
    let pieces: Vec<blake3::Hash> = bytes.par_chunks(PIECE).map(blake3::hash).collect();
    let mut hasher = blake3::Hasher::new();
    pieces.iter().for_each(|piece| {
        hasher.update(piece.as_bytes());
    });
    hasher.finalize().to_hex().to_string()
}
