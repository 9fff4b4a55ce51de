//! Records from JSON lines.

use std::io::BufRead;

use serde_json::{Map, Value};

use super::{Opened, record_error};
use crate::{Error, Result};

/// The objects of a file with one a line, each with its line's number. Blank lines are
/// passed over.
pub(crate) struct Lines {
    opened: Opened,
    number: u64,
    line: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(opened: Opened) -> Self {
        Lines { opened, number: 0, line: Vec::new() }
    }

    fn read(&mut self) -> Result<Option<(u64, Map<String, Value>)>> {
        loop {
            self.line.clear();
            self.number += 1;
            let read = self.opened.reader.read_until(b'\n', &mut self.line);
            if read.map_err(|e| self.error(e))? == 0 {
                return Ok(None);
            }
            let line = std::str::from_utf8(&self.line).map_err(|e| {
                self.error(format!("is not UTF-8 (byte {} of it)", e.valid_up_to()))
            })?;
            if line.trim().is_empty() {
                continue;
            }
            return match serde_json::from_str(line) {
                Ok(Value::Object(record)) => Ok(Some((self.number, record))),
                Ok(other) => Err(self.error(format!("expected a JSON object, found {other:.60}"))),
                // serde_json counts lines within the one line that it was given.
                Err(error) => Err(self.error(format!(
                    "is not JSON (column {}): {}",
                    error.column(),
                    error.to_string().split(" at line ").next().unwrap_or_default()
                ))),
            };
        }
    }

    fn error(&self, why: impl ToString) -> Error {
        record_error(&self.opened.path, "line", self.number, why)
    }
}

impl Iterator for Lines {
    type Item = Result<(u64, Map<String, Value>)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}
