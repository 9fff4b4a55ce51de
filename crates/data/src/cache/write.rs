//! Writing a token cache: streaming, and not there until it is whole.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{COVERED, HEADER, Header, checksum};
use crate::{Error, Result};

/// A cache in the making.
pub(super) struct Writer {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    payload: blake3::Hasher,
    header: Header,
    table: Vec<u8>,
    /// Grown only once something is masked.
    mask: Vec<u8>,
}

/// A tokenised document; `learnt` is `None` where all is.
pub(super) struct Tokenised {
    pub(super) ids: Vec<u32>,
    pub(super) learnt: Option<Vec<bool>>,
}

impl Writer {
    pub(super) fn create(path: &Path, key: [u8; 32], vocab_size: usize) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let file = tempfile::Builder::new()
            .prefix(".tokens-")
            .tempfile_in(folder)
            .map_err(|e| Error::io(folder, e))?;
        let mut writer = Writer {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(1 << 18, file),
            payload: blake3::Hasher::new(),
            header: Header {
                width: if vocab_size <= 1 << 16 { 2 } else { 4 },
                tokens: 0,
                documents: 0,
                masked: false,
                key,
            },
            table: Vec::new(),
            mask: Vec::new(),
        };
        writer.file.write_all(&[0; HEADER]).map_err(|e| Error::io(path, e))?;
        Ok(writer)
    }

    pub(super) fn documents(&self) -> u64 {
        self.header.documents
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.payload.update(bytes);
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }

    pub(super) fn push(&mut self, document: &Tokenised) -> Result<()> {
        let wide: Vec<u8> = document.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let hash = blake3::hash(&wide);
        if self.header.width == 2 {
            let narrow: Vec<u8> = wide.chunks_exact(4).flat_map(|id| [id[0], id[1]]).collect();
            self.put(&narrow)?;
        } else {
            self.put(&wide)?;
        }
        let start = self.header.tokens as usize;
        self.header.tokens += document.ids.len() as u64;
        self.header.documents += 1;
        self.table.extend_from_slice(&self.header.tokens.to_le_bytes());
        self.table.extend_from_slice(&hash.as_bytes()[..8]);
        if document.learnt.is_some() && !self.header.masked {
            self.header.masked = true;
            // Whatever came before is learnt.
            (0..start).for_each(|at| push_bit(&mut self.mask, at, true));
        }
        if self.header.masked {
            let learnt = |i| document.learnt.as_ref().is_none_or(|l| l.get(i) == Some(&true));
            (0..document.ids.len()).for_each(|i| push_bit(&mut self.mask, start + i, learnt(i)));
        }
        Ok(())
    }

    /// Writes the rest, makes it durable, and gives it its name.
    pub(super) fn finish(mut self) -> Result<()> {
        let path = self.path.clone();
        let io = |e| Error::io(&path, e);
        let ids = self.header.tokens as usize * self.header.width;
        self.put(&vec![0; ids.next_multiple_of(8) - ids])?;
        let (table, mask) = (std::mem::take(&mut self.table), std::mem::take(&mut self.mask));
        self.put(&table)?;
        if self.header.masked {
            self.put(&mask)?;
        }
        let header: [u8; COVERED] = self.header.encode();
        let sum = checksum(self.payload.clone(), &header);
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(&header).map_err(io)?;
        self.file.write_all(&sum).map_err(io)?;
        let file = self.file.into_inner().map_err(|e| io(e.into_error()))?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&path).map_err(|e| Error::io(&path, e.error))?;
        // The name is durable only once its folder is.
        if let Some(folder) = path.parent() {
            std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        }
        Ok(())
    }
}

fn push_bit(mask: &mut Vec<u8>, at: usize, bit: bool) {
    if mask.len() <= at / 8 {
        mask.resize(at / 8 + 1, 0);
    }
    if let Some(byte) = mask.get_mut(at / 8) {
        *byte |= u8::from(bit) << (at % 8);
    }
}
