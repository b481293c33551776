//! TensorBoard event files: scalars as protocol buffers in TFRecord framing.
//!
//! A record is `length u64 | masked crc32c of it u32 | data | masked crc32c of data u32`, little-endian; data is a
//! `tensorflow.Event` (field 1 wall_time, 2 step, 3 file_version, 5 summary, 7 session_log).

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// An open event file. Every start of a run makes a new one; TensorBoard reads all of a folder together.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates a file in `folder` for a run that goes on after `step`: what older files hold of later steps is void.
    pub fn create(folder: &Path, step: u64) -> Result<EventFile> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let name = format!("events.out.tfevents.{:010}.relora-kit.{}", now() as u64, std::process::id());
        let path = folder.join(name);
        let file = File::options().create(true).append(true).open(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut events = EventFile { path, file };
        events.write(0, |event| bytes(event, 3, b"brain.Event:2"))?;
        // SessionLog { status: START }
        events.write(step + 1, |event| bytes(event, 7, &[0x08, 0x01]))?;
        Ok(events)
    }

    /// Appends these values, each a `(tag, value)`, in one event.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut scalar = Vec::new();
            bytes(&mut scalar, 1, tag.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &scalar);
        }
        self.write(step, |event| bytes(event, 5, &summary))
    }

    fn write(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        what(&mut event);
        self.file.write_all(&record(&event)).map_err(|e| Error::io("write", &self.path, e))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A field of bytes.
fn bytes(message: &mut Vec<u8>, field: u8, value: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

/// The checksum as TFRecord stores it: turned and shifted, so that a checksum of checksums is no trivial number.
fn masked(data: &[u8]) -> [u8; 4] {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli), RFC 3720, reflected polynomial 0x82f63b78; a bit at a time, as records are short.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn records_hold_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), 300).unwrap();
        events.scalars(301, &[("train/loss".into(), 2.5)]).unwrap();
        let data = fs::read(&events.path).unwrap();
        let mut rest = &data[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]));
            let body = &rest[12..12 + len];
            assert_eq!(rest[12 + len..16 + len], masked(body));
            records.push(body.to_vec());
            rest = &rest[16 + len..];
        }
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // wall_time takes 9 bytes; step 301 is 0xad 0x02.
        assert_eq!(records[1][9..], [0x10, 0xad, 0x02, 0x3a, 2, 8, 1]);
        let expected =
            [&[0x10, 0xad, 0x02, 0x2a, 19, 0x0a, 17, 0x0a, 10][..], b"train/loss", &[0x15, 0, 0, 0x20, 0x40]];
        assert_eq!(records[2][9..], expected.concat());
    }
}
