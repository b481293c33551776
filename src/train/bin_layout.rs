//! How ids lie in a `.bin` file: behind llm.c's header, or as plain numbers of a width that only the numbers tell.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::{ops::Range, path::Path};

/// No vocabulary is larger. What is read with too small a width has every other number below this, and what is read with
/// too large a one has numbers far above.
const MAX_ID: u64 = 1 << 20;

/// Where the ids lie in the file, and whether each takes four bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct BinLayout {
    /// Bytes of the ids.
    pub ids: Range<usize>,
    /// U32, else U16.
    pub wide: bool,
    /// The largest id.
    pub largest: u32,
}

/// Finds the layout of the file at `path` with these bytes. A plain file that could be of two widths is refused.
pub fn bin_layout(path: &Path, bytes: &[u8]) -> Result<BinLayout> {
    /// First number of llm.c's header -> whether ids take four bytes.
    const MAGIC: [(i32, bool); 2] = [(20240520, false), (20240801, true)];
    const HEADER: usize = 256 * 4;
    let refuse = |what: String| {
        Error::request(format!("'{}' is not a file of token ids: {what}", path.display()))
            .help("expected nanoGPT's plain u16, or llm.c's header of 256 numbers and then u16 or u32")
    };
    if bytes.starts_with(b"MMIDIDX\0\0") {
        return Err(refuse("it is the index of a data set of Megatron".into()));
    }
    let index = path.with_extension("idx");
    if index.is_file() {
        return Err(refuse(format!("it is a data set of Megatron, whose index is '{}'", index.display()))
            .help(format!("make a shard of it: relora-kit tokenize {} --ids megatron -o SHARD", path.display())));
    }
    let number = |i: usize| bytes.as_chunks::<4>().0.get(i).map_or(0, |b| i32::from_le_bytes(*b));
    let headed = MAGIC.iter().find(|(magic, _)| *magic == number(0) && bytes.len() >= HEADER);
    let (start, wide) = headed.map_or((0, false), |(_, wide)| (HEADER, *wide));
    let (width, data) = (if wide { 4 } else { 2 }, &bytes[start..]);
    let len = data.len() / width;
    if data.len() % width != 0 {
        return Err(refuse(format!("{} bytes are no whole number of ids", data.len())));
    }
    if headed.is_some() && number(2) as usize != len {
        return Err(refuse(format!("its header says {} tokens, the file holds {len}", number(2))));
    }
    if data.is_empty() {
        return Err(refuse("it is empty".into()));
    }
    let largest = |width: usize| match width {
        2 => data.as_chunks::<2>().0.par_iter().map(|b| u64::from(u16::from_le_bytes(*b))).max(),
        4 => data.as_chunks::<4>().0.par_iter().map(|b| u64::from(u32::from_le_bytes(*b))).max(),
        _ => data.as_chunks::<8>().0.par_iter().map(|b| u64::from_le_bytes(*b)).max(),
    };
    if headed.is_none() {
        // Read as u16 they would be ids with zeros between them, and half of the predictions free.
        for (width, kind) in [(8, "i64"), (4, "u32")] {
            let other = largest(width).filter(|&id| data.len().is_multiple_of(width) && id < MAX_ID);
            if let (Some(other), Some(own)) = (other, largest(2)) {
                return Err(Error::request(format!(
                    "'{}' has no header, and its numbers are ids of {kind} (the largest {other}) as well as of u16 (the \
                     largest {own})",
                    path.display()
                ))
                .help(format!(
                    "say which, and make a shard of it: relora-kit tokenize {} --ids {kind} -o SHARD (or --ids u16)",
                    path.display()
                )));
            }
        }
    }
    let largest = largest(width).unwrap_or_default() as u32;
    Ok(BinLayout { ids: start..bytes.len(), wide, largest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> Vec<u32> {
        (0..1000u32).map(|i| i.wrapping_mul(2_654_435_761) % 50_257).collect()
    }

    #[test]
    fn wider_ids_without_a_header_are_refused_and_both_readings_named() {
        let path = Path::new("x.bin");
        let u16s: Vec<u8> = ids().iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
        let found = bin_layout(path, &u16s).unwrap();
        assert_eq!(found, BinLayout { ids: 0..2000, wide: false, largest: *ids().iter().max().unwrap() });
        let u32s: Vec<u8> = ids().iter().flat_map(|id| id.to_le_bytes()).collect();
        let i64s: Vec<u8> = ids().iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
        // A vocabulary of more than 65,536 ids: the high halves are not all zero.
        let large: Vec<u8> = ids().iter().flat_map(|id| (id + 100_000).to_le_bytes()).collect();
        for (bytes, kind) in [(u32s, "u32"), (i64s, "i64"), (large, "u32")] {
            let error = bin_layout(path, &bytes).unwrap_err();
            assert!(error.message.contains(&format!("ids of {kind} (")) && error.message.contains("of u16"), "{error}");
            assert!(error.help.unwrap().contains(&format!("--ids {kind}")));
        }
        // Ids below 16 alone leave it open.
        assert!(bin_layout(path, &[1, 0, 2, 0]).is_err());
        let (magic, tokens) = (20_240_801u32, ids().len() as u32);
        let header: Vec<u8> = [magic, 1, tokens].into_iter().chain([0; 253]).flat_map(u32::to_le_bytes).collect();
        let headed = [header, ids().iter().flat_map(|id| id.to_le_bytes()).collect()].concat();
        assert!(bin_layout(path, &headed).unwrap().wide);
    }

    #[test]
    fn data_of_megatron_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        std::fs::write(folder.path().join("x.idx"), b"MMIDIDX\0\0").unwrap();
        let error = bin_layout(&path, &[1, 0, 2, 200]).unwrap_err();
        assert!(error.message.contains("a data set of Megatron, whose index is"), "{error}");
    }
}
