//! Writing packed weights: not there until they are whole.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use relufy_model::Params;
use relufy_ops::buffer::to_host;

use super::file::{
    Header, MAGIC, MatrixEntry, PAGE, PREFIX, Span, VERSION, VectorEntry, hash, header_hash,
};
use super::origin::Origin;
use super::partial;
use crate::Engine;

/// Writes the weights of an engine, whose vectors are `params`', under `path`.
pub(super) fn write(
    path: &Path,
    (key, origin): (&str, &Origin),
    engine: &Engine,
    params: &Params,
) -> io::Result<()> {
    let vectors = params.iter().filter(|param| !param.is_matrix());
    let vectors = vectors
        .map(|param| Ok((format!("{:?}", param.id), to_host(&param.tensor)?)))
        .collect::<relufy_ops::Result<Vec<_>>>()
        .map_err(io::Error::other)?;
    let mut spans = Spans::default();
    let matrices = engine.packed.matrices().map(|matrix| MatrixEntry {
        name: matrix.name.clone(),
        format: matrix.format,
        shape: matrix.shape(),
        data: spans.add(matrix.data()),
        scales: (matrix.scales().iter().filter(|scales| !scales.is_empty()))
            .map(|scales| spans.add(bytemuck::cast_slice(scales)))
            .collect(),
    });
    let matrices = matrices.collect();
    let vectors = vectors.iter().map(|(name, values)| VectorEntry {
        name: name.clone(),
        data: spans.add(bytemuck::cast_slice(values)),
    });
    let vectors = vectors.collect();
    let (key, origin) = (key.to_owned(), origin.clone());
    let header = Header { key, origin, bytes: spans.end, matrices, vectors };
    let json = serde_json::to_vec(&header)?;

    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    // What others left behind may be the room that is missing.
    partial::sweep(folder);
    let file = partial::begin(folder)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut prefix = MAGIC.to_vec();
    prefix.extend(VERSION.to_le_bytes());
    prefix.extend(1u32.to_ne_bytes());
    prefix.extend((json.len() as u64).to_le_bytes());
    let checksum = header_hash(&prefix, &json);
    out.write_all(&prefix)?;
    out.write_all(&checksum)?;
    out.write_all(&json)?;
    pad(&mut out, PREFIX + json.len())?;
    for bytes in spans.bytes {
        out.write_all(bytes)?;
        pad(&mut out, bytes.len())?;
    }
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    // Not synced: what a crash cuts short is found out by its checksums.
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Fills the last page.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; PAGE][..written.next_multiple_of(PAGE) - written])
}

/// What comes one after the other.
#[derive(Default)]
struct Spans<'a> {
    bytes: Vec<&'a [u8]>,
    end: u64,
}

impl<'a> Spans<'a> {
    fn add(&mut self, bytes: &'a [u8]) -> Span {
        let offset = self.end;
        self.bytes.push(bytes);
        self.end += bytes.len().next_multiple_of(PAGE) as u64;
        Span { offset, bytes: bytes.len() as u64, hash: hash(bytes) }
    }
}
