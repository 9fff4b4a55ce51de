//! A file as a stream of plain bytes, whatever compresses it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Format;
use crate::{Error, Result};

/// A file, open for reading.
pub(crate) struct Opened {
    /// Its name, for errors.
    pub(super) path: PathBuf,
    /// Its content, decompressed.
    pub(super) reader: Box<dyn BufRead>,
    /// Whether `reader` decompresses.
    pub(super) compressed: bool,
}

/// How a file is compressed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    Zstd,
    Gzip,
}

/// What a name tells: the format, and how that is compressed.
fn endings(path: &Path) -> (Option<Format>, Option<Compression>) {
    let ending = |path: &Path| {
        path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
    };
    let compression = match ending(path).as_str() {
        "zst" | "zstd" => Some(Compression::Zstd),
        "gz" => Some(Compression::Gzip),
        _ => None,
    };
    let inner = match compression {
        Some(_) => path.with_extension(""),
        None => path.to_path_buf(),
    };
    let format = match ending(&inner).as_str() {
        "txt" | "text" | "md" => Some(Format::Text),
        "jsonl" | "ndjson" | "json" => Some(Format::Jsonl),
        "parquet" => Some(Format::Parquet),
        _ => None,
    };
    (format, compression)
}

/// What a file is, by its name unless `given`.
pub(crate) fn format_of(path: &Path, given: Option<Format>) -> Result<Format> {
    given.or_else(|| endings(path).0).ok_or_else(|| {
        Error::bad_file(
            path,
            "the name does not tell the format (.txt, .jsonl, .parquet, each also .zst or .gz): \
             set `format`",
        )
    })
}

/// Whether a name tells of a format that can be read.
pub(crate) fn is_readable(path: &Path) -> bool {
    endings(path).0.is_some()
}

/// Opens a file; `count` grows by the bytes read from disk.
pub(crate) fn open(path: &Path, count: Arc<AtomicU64>) -> Result<Opened> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    if file.metadata().map_err(|e| Error::io(path, e))?.is_dir() {
        return Err(Error::bad_file(path, "is a folder"));
    }
    let counted = BufReader::with_capacity(1 << 16, Counted { file, count });
    let compression = endings(path).1;
    let mut reader: Box<dyn BufRead> = match compression {
        Some(Compression::Zstd) => {
            let mut decoder =
                zstd::Decoder::with_buffer(counted).map_err(|e| Error::bad_file(path, e))?;
            // As much as `zstd --long=31` writes; the default refuses such files.
            decoder.window_log_max(31).map_err(|e| Error::bad_file(path, e))?;
            Box::new(BufReader::with_capacity(1 << 16, decoder))
        }
        Some(Compression::Gzip) => {
            let decoder = flate2::bufread::MultiGzDecoder::new(counted);
            Box::new(BufReader::with_capacity(1 << 16, decoder))
        }
        None => Box::new(counted),
    };
    // Here and not with the next read: to the gzip decoder, a file without a gzip header is
    // empty from then on.
    let begin = reader.fill_buf().map_err(|e| Error::bad_file(path, e))?;
    // A byte order mark is no text.
    if begin.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    Ok(Opened { path: path.to_path_buf(), reader, compressed: compression.is_some() })
}

/// Counts what is read.
struct Counted {
    file: File,
    count: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buf)?;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
