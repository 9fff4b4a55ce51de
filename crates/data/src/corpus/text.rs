//! Documents from plain text.

use std::io::{BufRead, Read};

use super::{Document, Opened, SourceConfig, TextSplit, record_error};
use crate::{Error, Result};

/// The documents of a text file, split as the source says.
pub(super) fn documents(
    opened: Opened,
    source: &SourceConfig,
) -> Box<dyn Iterator<Item = Result<Document>>> {
    let cut = match (&source.separator, source.split) {
        (Some(separator), _) => Cut::Separator(separator.clone().into_bytes()),
        (None, Some(TextSplit::Line)) => Cut::Line,
        (None, Some(TextSplit::BlankLine)) => Cut::BlankLine,
        (None, Some(TextSplit::File) | None) => Cut::File,
    };
    Box::new(Pieces { opened, cut, number: 0, done: false })
}

enum Cut {
    File,
    Line,
    BlankLine,
    Separator(Vec<u8>),
}

struct Pieces {
    opened: Opened,
    cut: Cut,
    /// Lines for those that count lines, else documents.
    number: u64,
    done: bool,
}

impl Pieces {
    /// The next piece's bytes, without what separates it; `None` at the end.
    fn read(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let reader = &mut self.opened.reader;
        let mut bytes = Vec::new();
        match &self.cut {
            Cut::File => {
                self.number += 1;
                self.done = true;
                reader.read_to_end(&mut bytes)?;
            }
            Cut::Line => {
                self.number += 1;
                self.done = reader.read_until(b'\n', &mut bytes)? == 0;
                trim_line_ends(&mut bytes);
            }
            Cut::BlankLine => loop {
                let before = bytes.len();
                self.number += 1;
                self.done = reader.read_until(b'\n', &mut bytes)? == 0;
                if self.done || bytes[before..].iter().all(u8::is_ascii_whitespace) {
                    bytes.truncate(before);
                    trim_line_ends(&mut bytes);
                    break;
                }
            },
            Cut::Separator(separator) => {
                self.number += 1;
                let last = separator.last().copied().unwrap_or(b'\n');
                loop {
                    if reader.read_until(last, &mut bytes)? == 0 {
                        self.done = true;
                        break;
                    }
                    if bytes.ends_with(separator) {
                        bytes.truncate(bytes.len() - separator.len());
                        break;
                    }
                }
                trim_line_ends(&mut bytes);
                let start = bytes.iter().take_while(|b| matches!(b, b'\n' | b'\r')).count();
                bytes.drain(..start);
            }
        }
        Ok((!self.done || !bytes.is_empty()).then_some(bytes))
    }

    fn error(&self, why: impl ToString) -> Error {
        let unit = match self.cut {
            Cut::Line | Cut::BlankLine => "line",
            Cut::File | Cut::Separator(_) => "document",
        };
        record_error(&self.opened.path, unit, self.number, why)
    }
}

impl Iterator for Pieces {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        match self.read() {
            Ok(bytes) => Some(match String::from_utf8(bytes?) {
                Ok(text) => Ok(Document { text, masked: Vec::new() }),
                Err(error) => {
                    let at = error.utf8_error().valid_up_to();
                    Err(self.error(format!("is not UTF-8 (byte {at} of it)")))
                }
            }),
            Err(error) => Some(Err(self.error(error))),
        }
    }
}

fn trim_line_ends(bytes: &mut Vec<u8>) {
    while matches!(bytes.last(), Some(b'\n' | b'\r')) {
        bytes.pop();
    }
}
