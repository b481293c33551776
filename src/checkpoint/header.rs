//! The header of one safetensors file, checked before anything trusts it.
//!
//! Format: 8 bytes little-endian header length, that many bytes of JSON
//! (`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {..}}`), then the data without holes.
//! Source: the format section of the safetensors README.

use crate::error::{Error, Result};
use safetensors::Dtype;
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, Visitor},
};
use std::{collections::BTreeMap, fmt, path::Path};

/// The reference implementation's limit on the header, in bytes.
pub const MAX_HEADER_LEN: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name as stored.
    pub name: String,
    /// Element type as stored.
    pub dtype: Dtype,
    /// Extents, outermost first. Empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub begin: u64,
    /// Past-the-end byte, counted from the start of the file.
    pub end: u64,
}

/// A checked header: every tensor lies inside the file, none overlap, no byte is unaccounted for.
#[derive(Debug, Default)]
pub struct Header {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses and checks the header of a file whose whole content is `bytes`.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
        let bad = |what: String| {
            Error::request(format!("'{}' is not a valid safetensors file: {what}", path.display())).help(remedy(bytes))
        };
        let file_len = bytes.len() as u64;
        let Some(prefix) = bytes.first_chunk::<8>() else {
            return Err(bad(format!("expected at least 8 bytes, found {file_len}")));
        };
        let header_len = u64::from_le_bytes(*prefix);
        if header_len > MAX_HEADER_LEN {
            return Err(bad(format!("its header claims {header_len} bytes, more than the limit of {MAX_HEADER_LEN}")));
        }
        if header_len > file_len - 8 {
            return Err(bad(format!("its header claims {header_len} bytes, the file holds {} after it", file_len - 8)));
        }
        let data_start = 8 + header_len;
        let raw: RawHeader = serde_json::from_slice(&bytes[8..data_start as usize])
            .map_err(|e| bad(format!("its header is not the expected JSON: {e}")))?;

        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (name, raw) in raw.tensors {
            tensors.push(raw.check(name, data_start).map_err(&bad)?);
        }
        tensors.sort_by_key(|t| (t.begin, t.end));
        check_layout(&tensors, data_start, file_len).map_err(bad)?;
        Ok(Header { tensors, metadata: raw.metadata })
    }
}

/// Other formats are told by their first bytes.
fn remedy(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'P', b'K', 3, 4, ..] | [0x80, 2, ..] => {
            "it looks like a PyTorch file: name the folder if it is an adapter's, else run `relora-kit convert` first"
        }
        [b'G', b'G', b'U', b'F', ..] => "it is a GGUF file: run `relora-kit convert` first",
        _ => "download or write the file again",
    }
}

/// Every byte of the data belongs to exactly one tensor. `tensors` are sorted by their first byte.
fn check_layout(tensors: &[TensorInfo], data_start: u64, file_len: u64) -> std::result::Result<(), String> {
    let end = tensors.iter().map(|t| t.end).max().unwrap_or(data_start);
    if end > file_len {
        let first = tensors.iter().find(|t| t.end > file_len).map_or("", |t| &t.name);
        return Err(format!(
            "it is cut short: its header promises {} data bytes, the file holds {}; first tensor affected: '{first}'",
            end - data_start,
            file_len - data_start
        ));
    }
    let mut expected = data_start;
    for (i, t) in tensors.iter().enumerate() {
        if t.begin < expected {
            let before = &tensors[i - 1];
            return Err(format!(
                "tensor '{}' at bytes {}..{} overlaps '{}' at {}..{}",
                t.name, t.begin, t.end, before.name, before.begin, before.end
            ));
        }
        if t.begin > expected {
            return Err(format!("bytes {expected}..{} before tensor '{}' belong to no tensor", t.begin, t.name));
        }
        expected = t.end;
    }
    if expected != file_len {
        return Err(format!("bytes {expected}..{file_len} at its end belong to no tensor"));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    fn check(self, name: String, data_start: u64) -> std::result::Result<TensorInfo, String> {
        let [begin, end] = self.data_offsets;
        let dtype: Dtype = serde_json::from_value(self.dtype.as_str().into())
            .map_err(|_| format!("tensor '{name}' at byte {begin} has the unknown dtype '{}'", self.dtype))?;
        let stored = end
            .checked_sub(begin)
            .ok_or_else(|| format!("tensor '{name}' ends at byte {end} before it begins at {begin}"))?;
        // Packed types (F4) share bytes: a whole number of them in all.
        let bits = self.shape.iter().try_fold(dtype.bitsize() as u64, |n, &extent| n.checked_mul(extent));
        if let Some(bits) = bits.filter(|bits| !bits.is_multiple_of(8)) {
            return Err(format!(
                "tensor '{name}' at byte {begin}: {dtype:?} {:?} is {bits} bits, no whole bytes",
                self.shape
            ));
        }
        let needed = bits.map(|bits| bits / 8);
        if needed != Some(stored) {
            let needed = needed.map_or("more bytes than a file can hold".to_owned(), |n| format!("{n} bytes"));
            return Err(format!(
                "tensor '{name}' at byte {begin}: {dtype:?} {:?} needs {needed}, its offsets span {stored}",
                self.shape
            ));
        }
        let place = |offset: u64| {
            offset.checked_add(data_start).ok_or_else(|| format!("tensor '{name}': offset {offset} overflows"))
        };
        let (begin, end) = (place(begin)?, place(end)?);
        Ok(TensorInfo { dtype, shape: self.shape.iter().map(|&n| n as usize).collect(), begin, end, name })
    }
}

/// The JSON object, with duplicate names refused (a map would keep one of them in silence).
#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("'{name}' appears twice")));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refusal(bytes: &[u8]) -> String {
        Header::parse(Path::new("m.safetensors"), bytes).unwrap_err().message
    }

    fn tensor(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    }

    #[test]
    fn a_valid_header_keeps_the_order_of_the_bytes() {
        let json = format!("{{{},{}}}", tensor("b", "F32", "[2]", 4, 12), tensor("a", "BF16", "[2,1]", 0, 4));
        let header = Header::parse(Path::new("m"), &file(&json, 12)).unwrap();
        assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(header.tensors[0].end, header.tensors[1].begin);
    }

    #[test]
    fn each_broken_rule_is_named() {
        let one = |t: String| format!("{{{t}}}");
        for (bytes, expected) in [
            (vec![0; 7], "expected at least 8 bytes, found 7"),
            ((100u64 << 30).to_le_bytes().to_vec(), "its header claims 107374182400 bytes, more than the limit"),
            (50u64.to_le_bytes().to_vec(), "its header claims 50 bytes, the file holds 0 after it"),
            (file("[]", 0), "not the expected JSON"),
            (file(&one(tensor("w", "F99", "[1]", 0, 4)), 4), "tensor 'w' at byte 0 has the unknown dtype 'F99'"),
            (file(&one(tensor("w", "F4", "[3]", 0, 1)), 1), "F4 [3] is 12 bits, no whole bytes"),
            (file(&one(tensor("w", "F4", "[4]", 0, 1)), 1), "F4 [4] needs 2 bytes, its offsets span 1"),
            (file(&one(tensor("w", "F32", "[3]", 0, 8)), 8), "F32 [3] needs 12 bytes, its offsets span 8"),
            (file(&one(tensor("w", "F32", "[4294967296,4294967296]", 0, 8)), 8), "more bytes than a file can hold"),
            (file(&one(tensor("w", "F32", "[1]", 8, 4)), 8), "ends at byte 4 before it begins at 8"),
            (
                file(&one(tensor("w", "F32", "[2]", 0, 8)), 4),
                "promises 8 data bytes, the file holds 4; first tensor affected: 'w'",
            ),
            (
                file(&format!("{{{},{}}}", tensor("v", "U8", "[6]", 0, 6), tensor("w", "U8", "[4]", 4, 8)), 8),
                "tensor 'w' at bytes 117..121 overlaps 'v' at 113..119",
            ),
            (file(&one(tensor("w", "U8", "[2]", 2, 4)), 4), "before tensor 'w' belong to no tensor"),
            (file(&one(tensor("w", "U8", "[2]", 0, 2)), 4), "at its end belong to no tensor"),
            (file(&format!("{{{0},{0}}}", tensor("w", "U8", "[2]", 0, 2)), 2), "'w' appears twice"),
        ] {
            let message = refusal(&bytes);
            assert!(message.contains(expected), "expected '{expected}' in: {message}");
        }
    }
}
