//! TensorBoard's event files: protocol buffers in TFRecord frames, both small enough to be
//! written by hand.
//!
//! A frame is `length: u64`, the masked CRC-32C of these eight bytes, the data, and the
//! masked CRC-32C of the data, all little-endian. The data is an `Event`
//! (tensorflow/core/util/event.proto), of which we write `wall_time` (1), `step` (2),
//! `file_version` (3), `summary` (5) and `session_log` (7).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// One event file, open for writing.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new file in `folder`. A run that continues after step `resumed` says so, and
    /// TensorBoard forgets what earlier files hold about later steps.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn create(folder: &Path, resumed: Option<u64>) -> Result<EventWriter> {
        std::fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let (path, file) = new_file(folder)?;
        let mut writer = EventWriter { path, file };
        let mut event = Message::default();
        event.double(1, now());
        event.bytes(3, b"brain.Event:2");
        writer.frame(&event.0)?;
        if let Some(step) = resumed {
            const START: u64 = 1;
            let mut session = Message::default();
            session.varint(1, START);
            let mut event = Message::default();
            event.double(1, now());
            event.varint(2, step + 1);
            event.bytes(7, &session.0);
            writer.frame(&event.0)?;
        }
        Ok(writer)
    }

    /// Writes scalars of one step.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut entry = Message::default();
            entry.bytes(1, tag.as_bytes());
            entry.float(2, *value as f32);
            summary.bytes(1, &entry.0);
        }
        let mut event = Message::default();
        event.double(1, now());
        event.varint(2, step);
        event.bytes(5, &summary.0);
        self.frame(&event.0)
    }

    fn frame(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(data.len() + 16);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(&masked_crc(&length).to_le_bytes());
        frame.extend_from_slice(data);
        frame.extend_from_slice(&masked_crc(data).to_le_bytes());
        let written = self.file.write_all(&frame).and_then(|()| self.file.flush());
        written.map_err(|source| Error::io(&self.path, source))
    }
}

/// A file of the name that TensorBoard looks for; readers sort by time, so the name must
/// not exist yet.
fn new_file(folder: &Path) -> Result<(PathBuf, File)> {
    let seconds = now() as u64;
    let process = std::process::id();
    for number in 0.. {
        let path =
            folder.join(format!("events.out.tfevents.{seconds:010}.relufy.{process}.{number}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::io(path, source)),
        }
    }
    Err(Error::damaged(folder, "no free name for an event file"))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// TFRecord's checksum: CRC-32C, turned and shifted so that checksums of data that holds
/// checksums stay useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protocol buffer message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-32C bit by bit, from its polynomial, unlike the table of the crate.
    fn crc_slowly(data: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        !crc
    }

    /// The records of a file, each checksum verified.
    fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
        let check = |data: &[u8], stored: &[u8]| {
            let crc = crc_slowly(data);
            let (low, high) = (crc % (1 << 15), crc / (1 << 15));
            let masked = (high + low * (1 << 17)).wrapping_add(0xa282_ead8);
            assert_eq!(masked, u32::from_le_bytes(stored.try_into().unwrap()));
        };
        let mut rest = bytes;
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            check(&rest[..8], &rest[8..12]);
            check(&rest[12..12 + length], &rest[12 + length..16 + length]);
            records.push(rest[12..12 + length].to_vec());
            rest = &rest[16 + length..];
        }
        records
    }

    /// The fields of a message: number and content (fixed and varint as little-endian bytes).
    fn fields(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut at = 0;
        let varint = |at: &mut usize| {
            let (mut value, mut shift) = (0u64, 0);
            loop {
                let byte = bytes[*at];
                *at += 1;
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        };
        let mut fields = Vec::new();
        while at < bytes.len() {
            let key = varint(&mut at);
            let length = match key & 7 {
                0 => {
                    fields.push((key >> 3, varint(&mut at).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                2 => varint(&mut at) as usize,
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, bytes[at..at + length].to_vec()));
            at += length;
        }
        fields
    }

    #[test]
    fn a_file_reads_back_by_an_independent_decoder() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), Some(300)).unwrap();
        let long = "density/".repeat(40);
        writer.scalars(301, &[("train/loss".into(), 2.25), (long.clone(), 0.5)]).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        let events: Vec<_> = records(&bytes).iter().map(|record| fields(record)).collect();
        assert_eq!(events.len(), 3);
        assert_eq!(events[0][1], (3, b"brain.Event:2".to_vec()));
        // The session starts again at the first step that is not yet there.
        assert_eq!(events[1][1], (2, 301u64.to_le_bytes().to_vec()));
        assert_eq!(fields(&events[1][2].1), [(1, 1u64.to_le_bytes().to_vec())]);
        assert_eq!(events[2][1], (2, 301u64.to_le_bytes().to_vec()));
        assert_eq!(events[2][2].0, 5);
        let values: Vec<_> =
            fields(&events[2][2].1).iter().map(|(_, value)| fields(value)).collect();
        assert_eq!(values[0][0], (1, b"train/loss".to_vec()));
        assert_eq!(values[0][1], (2, 2.25f32.to_le_bytes().to_vec()));
        assert_eq!(values[1][0], (1, long.into_bytes()));
    }

    #[test]
    fn the_checksum_is_castagnoli_s() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc_slowly(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn two_writers_of_one_second_have_two_files() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventWriter::create(folder.path(), None).unwrap();
        let second = EventWriter::create(folder.path(), None).unwrap();
        assert_ne!(first.path, second.path);
    }
}
