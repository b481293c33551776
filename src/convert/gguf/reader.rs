//! The header of a GGUF file, versions 2 and 3, little endian, checked before anything trusts it.
//!
//! Layout: `GGUF`, version (u32), number of tensors and of metadata entries (u64 each); the entries (key, type, value);
//! per tensor name, extents (innermost first), type and offset; then, aligned, the data. Strings and arrays carry their
//! length as u64. Source: docs/gguf.md of ggml.

use super::kind::Kind;
use crate::error::{Error, Result};
use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

/// The first four bytes.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Elements of one metadata array: twenty times the largest vocabulary.
const MAX_ARRAY: u64 = 1 << 24;

/// Bytes of one string: chat templates are the longest, with some ten thousand.
const MAX_STRING: u64 = 1 << 24;

/// ggml's own limit.
const MAX_DIMENSIONS: u32 = 4;

/// A metadata value. Arrays of arrays exist on paper only and are refused.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer, and booleans in arrays.
    Int(i128),
    /// f32, widened by way of its shortest decimal form (1e-5 stays 1e-5), or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of integers or booleans.
    Ints(Vec<i64>),
    /// An array of f32 or f64.
    Floats(Vec<f32>),
}

/// One tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Name as stored: `blk.0.attn_q.weight`.
    pub name: String,
    /// How its numbers are packed.
    pub kind: Kind,
    /// Extents, outermost first (the file stores them innermost first).
    pub shape: Vec<usize>,
    /// Which of the model's files holds it.
    pub file: usize,
    /// First byte, counted from the start of the file.
    pub begin: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A checked header and the open file, or those of all parts. Every tensor lies inside its file, and none overlap.
pub struct Gguf {
    /// Where it is.
    pub path: PathBuf,
    /// Open for reading.
    pub files: Vec<File>,
    /// By key.
    pub metadata: BTreeMap<String, Value>,
    /// In the order of the header.
    pub tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Opens a file and checks its header. Allocates no more than the file's own size can ask for.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = crate::inputs::open(path)?;
        let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        let mut header = Header { reader: BufReader::with_capacity(1 << 16, &file), path, at: 0, len };
        let (metadata, tensors) = header.read()?;
        Ok(Gguf { path: path.to_owned(), metadata, tensors, files: vec![file] })
    }

    /// An error about this file.
    pub fn bad(&self, what: impl std::fmt::Display) -> Error {
        Error::request(format!("'{}': {what}", self.path.display()))
    }
}

struct Header<'a> {
    reader: BufReader<&'a File>,
    path: &'a Path,
    at: u64,
    len: u64,
}

impl Header<'_> {
    fn read(&mut self) -> Result<(BTreeMap<String, Value>, Vec<TensorInfo>)> {
        if self.len < 24 || &self.array::<4>()? != MAGIC {
            return Err(self.bad("it does not begin with 'GGUF' and a header"));
        }
        let version = self.u32()?;
        match version {
            2 | 3 => {}
            v if v.swap_bytes() <= 3 => return Err(self.bad("it is big endian, expected little endian")),
            v => return Err(self.bad(format!("version {v} is not supported, expected 2 or 3"))),
        }
        let (tensors, entries) = (self.u64()?, self.u64()?);
        // A key, a type and a value take at least 13 bytes; a name, a shape, a type and an offset at least 24.
        self.check_count(entries, 13, "metadata entries")?;
        self.check_count(tensors, 24, "tensors")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(&key, kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.bad(format!("the metadata key '{key}' stands twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(&Value::Int(n)) if n > 0 && n <= 1 << 20 && n % 8 == 0 => n as u64,
            Some(other) => {
                return Err(self.bad(format!("general.alignment is {other:?}, expected a small multiple of 8")));
            }
        };
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(self.tensor()?);
        }
        let start = self.at.next_multiple_of(alignment);
        self.place(&mut infos, start, alignment)?;
        Ok((metadata, infos))
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(
                self.bad(format!("tensor '{name}' has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}"))
            );
        }
        let mut extents = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<u64>>>()?;
        let id = self.u32()?;
        let begin = self.u64()?;
        let kind = Kind::from_id(id).map_err(|type_name| {
            self.bad(format!("tensor '{name}' has the type {type_name}, which is not supported"))
                .help(format!("supported: {}", Kind::supported()))
        })?;
        let (block, size) = (kind.block() as u64, kind.block_bytes() as u64);
        let row = extents.first().copied().unwrap_or(1);
        let elements = extents.iter().try_fold(1u64, |n, &extent| n.checked_mul(extent));
        let bytes = elements.filter(|_| row.is_multiple_of(block)).and_then(|n| (n / block).checked_mul(size));
        let Some(bytes) = bytes.filter(|&n| n <= i64::MAX as u64) else {
            return Err(self.bad(format!(
                "tensor '{name}' has the extents {extents:?}, expected a size that fits a file in blocks of {block}"
            )));
        };
        extents.reverse();
        let shape = extents.into_iter().map(|n| n as usize).collect();
        Ok(TensorInfo { name, kind, shape, file: 0, begin, bytes })
    }

    /// Turns offsets inside the data into offsets inside the file, and checks them.
    fn place(&self, tensors: &mut [TensorInfo], start: u64, alignment: u64) -> Result<()> {
        let mut names = HashSet::new();
        for t in tensors.iter_mut() {
            if !names.insert(t.name.clone()) {
                return Err(self.bad(format!("tensor '{}' is stored twice", t.name)));
            }
            if !t.begin.is_multiple_of(alignment) {
                return Err(self.bad(format!(
                    "tensor '{}' begins at byte {} of the data, expected a multiple of {alignment}",
                    t.name, t.begin
                )));
            }
            let end = start.checked_add(t.begin).and_then(|begin| begin.checked_add(t.bytes));
            if end.is_none_or(|end| end > self.len) {
                return Err(self.bad(format!(
                    "it is cut short: tensor '{}' needs {} bytes from byte {}, the file ends at {}",
                    t.name,
                    t.bytes,
                    start.saturating_add(t.begin),
                    self.len
                )));
            }
            t.begin += start;
        }
        let mut order: Vec<&TensorInfo> = tensors.iter().filter(|t| t.bytes > 0).collect();
        order.sort_by_key(|t| t.begin);
        if let Some([a, b]) = order.array_windows().find(|[a, b]| a.begin + a.bytes > b.begin) {
            return Err(self.bad(format!("tensor '{}' overlaps '{}' from byte {}", b.name, a.name, b.begin)));
        }
        Ok(())
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0..=5 | 10 | 11 => Value::Int(self.integer(kind)?),
            6 => Value::Float(widen(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.list(key)?,
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.bad(format!("the metadata key '{key}' has the unknown type {other}"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => return Err(self.bad(format!("the metadata key '{key}' is an array of the type {other}"))),
        };
        self.check_count(count, size, &format!("elements of '{key}'"))?;
        if count > MAX_ARRAY {
            return Err(self.bad(format!("'{key}' has {count} elements, more than the limit of {MAX_ARRAY}")));
        }
        let items = 0..count;
        Ok(match kind {
            8 => Value::Texts(items.map(|_| self.text()).collect::<Result<_>>()?),
            6 => Value::Floats(items.map(|_| Ok(f32::from_le_bytes(self.array()?))).collect::<Result<_>>()?),
            12 => Value::Floats(items.map(|_| Ok(f64::from_le_bytes(self.array()?) as f32)).collect::<Result<_>>()?),
            _ => Value::Ints(items.map(|_| Ok(self.integer(kind)? as i64)).collect::<Result<_>>()?),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 | 7 => u8::from_le_bytes(self.array()?).into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => u32::from_le_bytes(self.array()?).into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            10 => u64::from_le_bytes(self.array()?).into(),
            _ => i64::from_le_bytes(self.array()?).into(),
        })
    }

    fn text(&mut self) -> Result<String> {
        let len = self.u64()?;
        if len > MAX_STRING || len > self.len - self.at {
            return Err(self.bad(format!(
                "a string at byte {} claims {len} bytes, the file holds {} after it (limit {MAX_STRING})",
                self.at - 8,
                self.len - self.at
            )));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.bad(format!("the string before byte {} is not UTF-8", self.at)))
    }

    fn check_count(&self, count: u64, size: u64, what: &str) -> Result<()> {
        let left = self.len - self.at;
        if count.checked_mul(size).is_none_or(|bytes| bytes > left) {
            return Err(self.bad(format!("it claims {count} {what}, but only {left} bytes follow")));
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() as u64 > self.len - self.at {
            return Err(self.bad(format!("it is cut short: its header goes on after its end at byte {}", self.len)));
        }
        self.reader.read_exact(bytes).map_err(|e| Error::io("read", self.path, e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn bad(&self, what: impl std::fmt::Display) -> Error {
        Error::request(format!("'{}' is not a valid GGUF file: {what}", self.path.display()))
            .help("download the file again")
    }
}

/// 1e-5 stored as f32 is 1e-5 again, not 9.999999747378752e-6.
fn widen(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| x.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, io::Write};

    fn fixture() -> Vec<u8> {
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf/types.gguf")).unwrap()
    }

    fn open(bytes: &[u8]) -> Result<Gguf> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Gguf::open(file.path())
    }

    #[track_caller]
    fn refused(bytes: &[u8], expected: &str) {
        let message = open(bytes).err().unwrap().message;
        assert!(message.contains(expected), "{message}");
    }

    /// Magic, version 3, so many tensors and metadata entries, and what follows.
    fn header(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(rest);
        bytes.resize(bytes.len() + 1000, 0);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn absurd_lengths_are_refused_before_anything_is_allocated() {
        refused(&header(u64::MAX, 0, &[]), "claims 18446744073709551615 tensors");
        refused(&header(0, 1 << 40, &[]), "claims 1099511627776 metadata entries");
        refused(&header(0, 1, &100_000_000_000u64.to_le_bytes()), "a string at byte 24 claims 100000000000 bytes");
        let array =
            [text("k"), 9u32.to_le_bytes().into(), 5u32.to_le_bytes().into(), (1u64 << 36).to_le_bytes().into()];
        refused(&header(0, 1, &array.concat()), "claims 68719476736 elements of 'k'");
        let nested = [text("k"), 9u32.to_le_bytes().into(), 9u32.to_le_bytes().into(), 1u64.to_le_bytes().into()];
        refused(&header(0, 1, &nested.concat()), "'k' is an array of the type 9");
        let tensor = |extents: [u64; 2], kind: u32| {
            let extents = extents.map(u64::to_le_bytes).concat();
            [text("w"), 2u32.to_le_bytes().into(), extents, kind.to_le_bytes().into(), vec![0; 8]].concat()
        };
        refused(&header(1, 0, &tensor([1 << 40, 1 << 40], 0)), "tensor 'w' has the extents [1099511627776, ");
        refused(&header(1, 0, &tensor([48, 2], 2)), "in blocks of 32");
        refused(&header(1, 0, &tensor([4096, 4096], 0)), "cut short: tensor 'w' needs 67108864 bytes");
        refused(&header(1, 0, &tensor([4, 1], 21)), "tensor 'w' has the type IQ3_S, which is not supported");
        refused(&header(1, 0, &tensor([4, 1], 99)), "the type number 99");
    }

    #[test]
    fn keys_and_tensors_stand_once() {
        let entry = [text("k"), 4u32.to_le_bytes().into(), vec![0; 4]].concat();
        refused(&header(0, 2, &[entry.clone(), entry].concat()), "the metadata key 'k' stands twice");
        let tensor = |name: &str, at: u64| {
            let at = at.to_le_bytes();
            [text(name), 1u32.to_le_bytes().into(), 16u64.to_le_bytes().into(), vec![0; 4], at.into()].concat()
        };
        refused(&header(2, 0, &[tensor("a", 0), tensor("a", 64)].concat()), "tensor 'a' is stored twice");
        refused(&header(2, 0, &[tensor("a", 0), tensor("b", 32)].concat()), "tensor 'b' overlaps 'a'");
        refused(&header(1, 0, &tensor("a", 8)), "tensor 'a' begins at byte 8 of the data, expected a multiple of 32");
        assert_eq!(open(&header(2, 0, &[tensor("a", 0), tensor("b", 64)].concat())).unwrap().tensors.len(), 2);
    }

    #[test]
    fn other_versions_and_every_truncation_are_refused() {
        let bytes = fixture();
        let patched = |at: usize, with: &[u8]| [&bytes[..at], with, &bytes[at + with.len()..]].concat();
        refused(&patched(4, &[1, 0, 0, 0]), "version 1 is not supported");
        refused(&patched(4, &[0, 0, 0, 3]), "big endian");
        refused(&patched(0, b"GGML"), "does not begin with 'GGUF'");
        for len in (0..bytes.len()).step_by(491) {
            assert!(open(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(open(&bytes).unwrap().tensors.len(), 21);
    }

    proptest! {
        #[test]
        fn a_damaged_header_is_no_panic(at in 0usize..4000, byte: u8) {
            let mut bytes = fixture();
            bytes[at] = byte;
            let _ = open(&bytes);
        }
    }
}
