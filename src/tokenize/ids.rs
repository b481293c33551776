//! Files of token ids that another program made, into a token shard: plain numbers of a named width, or the data sets of
//! Megatron-LM (a `.bin` file and its index, a `.idx` file beside it).
//!
//! Index: `MMIDIDX\0\0`; version 1 (u64); the type of the ids (u8); the numbers of sequences and of documents (u64 each); per
//! sequence its length (i32); per sequence its first byte in the `.bin` file (i64); per document its first sequence (i64).
//! Source: `megatron/core/datasets/indexed_dataset.py`.

use crate::{
    checkpoint::MappedFile,
    error::{Error, Result},
};
use std::{ops::Range, path::Path};

/// The largest id that a shard takes.
const MAX_ID: i64 = u32::MAX as i64;

/// How ids are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdType {
    /// Plain numbers, little endian.
    Plain(Number),
    /// A data set of Megatron-LM.
    Megatron,
}

/// A type of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// 8 bits.
    U8,
    /// 16 bits.
    U16,
    /// 32 bits.
    U32,
    /// 32 bits, signed.
    I32,
    /// 64 bits, signed.
    I64,
}

impl Number {
    fn bytes(self) -> usize {
        match self {
            Number::U8 => 1,
            Number::U16 => 2,
            Number::U32 | Number::I32 => 4,
            Number::I64 => 8,
        }
    }

    fn read(self, bytes: &[u8], out: &mut Vec<i64>) {
        match self {
            Number::U8 => out.extend(bytes.iter().map(|&b| i64::from(b))),
            Number::U16 => out.extend(bytes.as_chunks().0.iter().map(|b| i64::from(u16::from_le_bytes(*b)))),
            Number::U32 => out.extend(bytes.as_chunks().0.iter().map(|b| i64::from(u32::from_le_bytes(*b)))),
            Number::I32 => out.extend(bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b)))),
            Number::I64 => out.extend(bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b))),
        }
    }
}

/// A file of ids, opened and checked.
pub struct IdFile {
    data: MappedFile,
    number: Number,
    /// Bytes of each sequence, in order.
    sequences: Vec<Range<usize>>,
    /// Documents, as far as the file knows them.
    pub documents: u64,
}

impl IdFile {
    /// Opens the file of ids at `path`.
    pub fn open(path: &Path, kind: IdType) -> Result<IdFile> {
        match kind {
            IdType::Plain(number) => {
                let data = MappedFile::open(path)?;
                let len = data.bytes().len();
                if !len.is_multiple_of(number.bytes()) {
                    return Err(Error::request(format!(
                        "'{}' has {len} bytes, which is no whole number of {number:?}",
                        path.display()
                    ))
                    .help("check --ids"));
                }
                Ok(IdFile { data, number, sequences: std::iter::once(0..len).collect(), documents: 1 })
            }
            IdType::Megatron => Self::open_megatron(path),
        }
    }

    fn open_megatron(path: &Path) -> Result<IdFile> {
        let (data, index) = (path.with_extension("bin"), path.with_extension("idx"));
        let (data, index) = (MappedFile::open(&data)?, MappedFile::open(&index)?);
        let refuse = |what: String| {
            Error::request(format!("'{}' is not an index of Megatron: {what}", index.path().display()))
                .help("copy the .bin file and its .idx file again, or name plain numbers with --ids u16, u32 or i64")
        };
        let bytes = index.bytes();
        let cut = || refuse("it is cut short".into());
        let number = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..at + 8)?.first_chunk()?));
        if !bytes.starts_with(b"MMIDIDX\0\0") {
            return Err(refuse("it does not begin with 'MMIDIDX'".into()));
        }
        let version = number(9).ok_or_else(cut)?;
        if version != 1 {
            return Err(refuse(format!("it has version {version}, expected 1")));
        }
        let number_type = match bytes.get(17).ok_or_else(cut)? {
            1 => Number::U8,
            4 => Number::I32,
            5 => Number::I64,
            8 => Number::U16,
            other => return Err(refuse(format!("its ids have the type number {other}, expected 1, 4, 5 or 8"))),
        };
        let (count, documents) = (number(18).ok_or_else(cut)?, number(26).ok_or_else(cut)?);
        let lengths = 34;
        let pointers = usize::try_from(count).ok().and_then(|n| n.checked_mul(4)?.checked_add(lengths));
        let end = pointers.and_then(|at| (count as usize).checked_mul(8)?.checked_add(at));
        let (Some(pointers), Some(_)) = (pointers, end.filter(|&end| end <= bytes.len())) else { return Err(cut()) };
        let (ends, starts) = (&bytes[lengths..pointers], &bytes[pointers..]);
        let mut sequences = Vec::with_capacity(count as usize);
        for (length, start) in ends.as_chunks().0.iter().zip(starts.as_chunks().0) {
            let (length, start) = (i32::from_le_bytes(*length), i64::from_le_bytes(*start));
            let range = usize::try_from(start).ok().zip(usize::try_from(length).ok());
            let range =
                range.and_then(|(start, n)| Some(start..n.checked_mul(number_type.bytes())?.checked_add(start)?));
            match range.filter(|r| r.end <= data.bytes().len()) {
                Some(range) => sequences.push(range),
                None => {
                    return Err(refuse(format!(
                        "sequence {} has {length} ids from byte {start}, '{}' has {} bytes",
                        sequences.len(),
                        data.path().display(),
                        data.bytes().len()
                    )));
                }
            }
        }
        // The list of documents has one entry more than there are.
        Ok(IdFile { data, number: number_type, sequences, documents: documents.saturating_sub(1) })
    }

    /// Calls `each` with pieces of the ids, in order.
    pub fn read(&self, each: &mut dyn FnMut(&[u32]) -> Result<()>) -> Result<()> {
        let piece = (1 << 20) * self.number.bytes();
        let (mut wide, mut ids, mut before) = (Vec::new(), Vec::new(), 0);
        for sequence in &self.sequences {
            for bytes in self.data.bytes()[sequence.clone()].chunks(piece) {
                wide.clear();
                self.number.read(bytes, &mut wide);
                if let Some(i) = wide.iter().position(|id| !(0..=MAX_ID).contains(id)) {
                    return Err(Error::request(format!(
                        "'{}': token {} is {}, expected an id of 0 or more",
                        self.data.path().display(),
                        before + i,
                        wide[i]
                    ))
                    .help("the file holds other numbers, such as labels, or --ids names the wrong type"));
                }
                ids.clear();
                ids.extend(wide.iter().map(|&id| id as u32));
                before += ids.len();
                each(&ids)?;
            }
        }
        Ok(())
    }

    /// The largest id; `None` without any.
    pub fn largest(&self) -> Result<Option<u32>> {
        let mut largest = None;
        self.read(&mut |ids| {
            largest = largest.max(ids.iter().max().copied());
            Ok(())
        })?;
        Ok(largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn all(path: &Path, kind: IdType) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        IdFile::open(path, kind)?.read(&mut |ids| {
            found.extend_from_slice(ids);
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn plain_numbers_of_every_type_are_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.bin");
        for (kind, bytes) in [
            (Number::U8, vec![7, 255]),
            (Number::U16, [7u16, 255].map(u16::to_le_bytes).concat()),
            (Number::U32, [7u32, 255].map(u32::to_le_bytes).concat()),
            (Number::I32, [7i32, 255].map(i32::to_le_bytes).concat()),
            (Number::I64, [7i64, 255].map(i64::to_le_bytes).concat()),
        ] {
            fs::write(&path, &bytes).unwrap();
            assert_eq!(all(&path, IdType::Plain(kind)).unwrap(), [7, 255], "{kind:?}");
            if kind != Number::U8 {
                fs::write(&path, &bytes[1..]).unwrap();
                assert!(all(&path, IdType::Plain(kind)).unwrap_err().message.contains("no whole number"));
            }
        }
        fs::write(&path, [5i64, -100].map(i64::to_le_bytes).concat()).unwrap();
        let error = all(&path, IdType::Plain(Number::I64)).unwrap_err();
        assert!(error.message.contains("token 1 is -100"), "{error}");
    }

    /// An index of two sequences, the second stored first.
    fn index(kind: u8) -> Vec<u8> {
        let mut bytes = b"MMIDIDX\0\0".to_vec();
        bytes.extend(1u64.to_le_bytes());
        bytes.push(kind);
        bytes.extend([2u64, 3].map(u64::to_le_bytes).concat());
        bytes.extend([2i32, 1].map(i32::to_le_bytes).concat());
        bytes.extend([2i64, 0].map(i64::to_le_bytes).concat());
        bytes.extend([0i64, 1, 2].map(i64::to_le_bytes).concat());
        bytes
    }

    #[test]
    fn the_sequences_of_megatron_come_in_the_order_of_the_index() {
        let root = tempfile::tempdir().unwrap();
        let (path, idx) = (root.path().join("x.bin"), root.path().join("x.idx"));
        fs::write(&path, [9u16, 50_000, 3].map(u16::to_le_bytes).concat()).unwrap();
        fs::write(&idx, index(8)).unwrap();
        assert_eq!(all(&path, IdType::Megatron).unwrap(), [50_000, 3, 9]);
        assert_eq!(IdFile::open(&idx, IdType::Megatron).unwrap().documents, 2);
        for (bytes, words) in [
            (index(8)[..40].to_vec(), "cut short"),
            (index(8)[..12].to_vec(), "cut short"),
            (index(7), "type number 7"),
            (index(4), "sequence 0 has 2 ids from byte 2"),
            (b"MMIDIDY\0\0".to_vec(), "does not begin with"),
        ] {
            fs::write(&idx, bytes).unwrap();
            let error = all(&path, IdType::Megatron).unwrap_err();
            assert!(error.message.contains(words), "{error}");
        }
        fs::write(&idx, [&index(8)[..18], &[0xff; 16], &index(8)[34..]].concat()).unwrap();
        assert!(all(&path, IdType::Megatron).unwrap_err().message.contains("cut short"));
    }
}
