//! Documents from files: text, JSON lines, parquet; plain or compressed; here or on the
//! hub. Everything streams: memory holds a record, not a file.

mod chat;
mod config;
mod files;
mod jsonl;
mod open;
mod parquet;
mod records;
mod text;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use chat::ChatTemplate;
pub use config::{CorpusConfig, Format, Layout, SourceConfig, TextSplit};
pub use files::files;
pub(crate) use jsonl::Lines;
use open::Opened;
pub(crate) use open::{format_of, open};
pub(crate) use parquet::ParquetRows;

use crate::{Error, Hub, Result, Silent};
use records::Records;

/// One document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Byte ranges of the text that are read but not learnt: prompts.
    pub masked: Vec<Range<usize>>,
}

/// A streaming walk over the documents of a source, in the order of its files.
pub struct Documents {
    files: std::vec::IntoIter<PathBuf>,
    current: Option<Box<dyn Iterator<Item = Result<Document>>>>,
    source: SourceConfig,
    chat: ChatTemplate,
    eos: String,
    left: u64,
    bytes_read: Arc<AtomicU64>,
}

/// The documents of a source, streaming. Empty ones are left out.
///
/// # Errors
/// Now: where there are no files, or a setting makes no sense. Later, from the iterator:
/// [`Error::Record`] and [`Error::Io`], after which it ends.
pub fn documents(source: &SourceConfig, hub: &Hub) -> Result<Documents> {
    source.check()?;
    let files = files(source, hub, &Silent)?;
    Ok(Documents::over(source, files, ""))
}

impl Documents {
    /// The documents of files that were found before; `eos` is the text of that token,
    /// for chat templates.
    pub(crate) fn over(source: &SourceConfig, files: Vec<PathBuf>, eos: &str) -> Self {
        Documents {
            files: files.into_iter(),
            current: None,
            left: source.limit.unwrap_or(u64::MAX),
            chat: source.chat_template.clone().unwrap_or_default(),
            eos: eos.to_owned(),
            source: source.clone(),
            bytes_read: Arc::default(),
        }
    }

    /// Bytes of the files on disk that have been read, compressed where they are.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            if let Some(current) = &mut self.current {
                match current.next().transpose()? {
                    Some(document) if document.text.is_empty() => continue,
                    Some(document) => return Ok(Some(document)),
                    None => self.current = None,
                }
            }
            let Some(file) = self.files.next() else { return Ok(None) };
            let format = format_of(&file, self.source.format)?;
            let opened = open(&file, self.bytes_read.clone())?;
            self.current = Some(match format {
                Format::Text => text::documents(opened, &self.source),
                Format::Jsonl => {
                    let records = Lines::new(opened);
                    Box::new(Records::new(
                        records,
                        "line",
                        file,
                        &self.source,
                        &self.chat,
                        &self.eos,
                    ))
                }
                Format::Parquet => {
                    let records = ParquetRows::open(opened, Some(&self.source.columns()))?;
                    Box::new(Records::new(
                        records,
                        "row",
                        file,
                        &self.source,
                        &self.chat,
                        &self.eos,
                    ))
                }
            });
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        match self.advance() {
            Ok(Some(document)) => {
                self.left -= 1;
                Some(Ok(document))
            }
            Ok(None) => {
                self.left = 0;
                None
            }
            Err(error) => {
                // What follows a broken record has no known beginning.
                self.left = 0;
                Some(Err(error))
            }
        }
    }
}

/// Where a record stands, for its error.
pub(crate) fn record_error(
    path: &std::path::Path,
    unit: &'static str,
    number: u64,
    why: impl ToString,
) -> Error {
    Error::Record { path: path.to_path_buf(), unit, number, why: why.to_string() }
}
