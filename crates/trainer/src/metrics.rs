//! `metrics.jsonl`: one JSON object a line, written through at once. A resumed run cuts the
//! file back to the step it continues from, so that no step stands there twice.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// One line: what is known about one step.
pub type Record = Map<String, Value>;

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file for the steps after `step`: later lines of an earlier run, and a last
    /// line that was cut off, are dropped.
    ///
    /// # Errors
    /// A line in the middle that is no metrics; a file system that refuses.
    pub fn resume(path: &Path, step: u64) -> Result<Metrics> {
        let kept = match std::fs::read(path) {
            Ok(bytes) => keep_until(path, &bytes, step)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::io(path, source)),
        };
        relufy_model::checkpoint::write_atomic(path, &kept)?;
        let file = OpenOptions::new().append(true).open(path);
        Ok(Metrics { path: path.into(), file: file.map_err(|source| Error::io(path, source))? })
    }

    /// Appends a line; a reader sees all of it or nothing.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = Value::Object(record.clone()).to_string();
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|source| Error::io(&self.path, source))
    }
}

/// The lines up to `step`.
fn keep_until(path: &Path, bytes: &[u8], step: u64) -> Result<Vec<u8>> {
    let mut kept = Vec::new();
    for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let record = serde_json::from_slice::<Record>(line);
        match record.ok().and_then(|record| record.get("step").and_then(Value::as_u64)) {
            Some(at) if at <= step && line.ends_with(b"\n") => kept.extend_from_slice(line),
            Some(_) => {}
            // The writer was killed within this line.
            None if !line.ends_with(b"\n") => {}
            None => {
                let why = format!("line {} is no metrics of a step", number + 1);
                return Err(Error::damaged(path, why));
            }
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        let mut record = Record::new();
        record.insert("step".into(), step.into());
        record.insert("loss".into(), 1.5.into());
        record
    }

    #[test]
    fn a_resume_drops_later_steps_and_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::resume(&path, 0).unwrap();
        for step in 1..=5 {
            metrics.write(&record(step)).unwrap();
        }
        drop(metrics);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 6, \"lo");
        std::fs::write(&path, &text).unwrap();

        let mut metrics = Metrics::resume(&path, 3).unwrap();
        metrics.write(&record(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<Record>(line).unwrap()["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }

    #[test]
    fn a_foreign_file_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "hello\n{\"step\": 1}\n").unwrap();
        let error = Metrics::resume(&path, 5).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "hello\n{\"step\": 1}\n");
    }
}
