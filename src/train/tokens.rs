//! Token ids on disk and the order in which training sees them.
//!
//! A token shard is a safetensors file with one integer tensor `tokens` (U16 or U32, one dimension); its metadata say
//! which tokenizer made it and how many different ids there can be. It is memory-mapped like every other checkpoint.
//! The `.bin` files of nanoGPT (plain u16) and llm.c (a header of 256 i32, then u16 or u32) serve, too.

use super::bin_layout::{BinLayout, bin_layout};
use crate::{
    checkpoint::{Dtype, MappedFile, TensorFile},
    error::{Error, Kind, Result},
    run::sha256_file,
};
use serde::{Deserialize, Deserializer, Serialize};
use std::{
    ops::Range,
    path::{Path, PathBuf},
};

/// Ids that are looked through at a time.
const SCAN: usize = 1 << 20;

/// Name of the tensor in a token shard.
pub const TENSOR: &str = "tokens";
/// Metadata key: what turned text into ids.
pub const TOKENIZER: &str = "tokenizer";
/// Metadata key: sha256 of the `tokenizer.json` that turned text into ids.
pub const TOKENIZER_SHA256: &str = "tokenizer_sha256";
/// Metadata key: where that `tokenizer.json` was when the shard was made.
pub const TOKENIZER_PATH: &str = "tokenizer_path";
/// Metadata key: ids are below this number.
pub const VOCAB_SIZE: &str = "vocab_size";

/// A number of tokens, written as a number or with a suffix: `100M`, `1.5B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenCount(pub u64);

impl<'de> Deserialize<'de> for TokenCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        let wrong = || serde::de::Error::custom("expected a number of tokens, such as 100000, \"100M\" or \"1.5B\"");
        match Written::deserialize(deserializer).map_err(|_| wrong())? {
            Written::Number(n) => Ok(TokenCount(n)),
            Written::Text(text) => {
                let unit =
                    [('K', 1e3), ('M', 1e6), ('B', 1e9), ('T', 1e12)].into_iter().find(|(c, _)| text.ends_with(*c));
                let number = unit.map_or(&*text, |(c, _)| text.trim_end_matches(c));
                let value: f64 = number.trim().parse().map_err(|_| wrong())?;
                if !(value >= 0.0 && value.is_finite()) {
                    return Err(wrong());
                }
                Ok(TokenCount((value * unit.map_or(1.0, |u| u.1)).round() as u64))
            }
        }
    }
}

/// An open token shard.
pub struct TokenShard {
    source: Source,
    /// Whether an id takes four bytes instead of two.
    wide: bool,
    len: usize,
    vocab_size: usize,
    tokenizer_sha256: Option<String>,
    tokenizer_path: Option<PathBuf>,
}

enum Source {
    Shard(TensorFile),
    /// The ids lie in this range of the bytes.
    Bin(MappedFile, Range<usize>),
}

impl TokenShard {
    /// Opens and checks a shard made by `relora-kit tokenize`, or a `.bin` file of nanoGPT or llm.c.
    pub fn open(path: &Path) -> Result<TokenShard> {
        if path.extension().is_some_and(|e| e == "bin") {
            return Self::open_bin(path);
        }
        let refuse = |what: String| {
            Error::request(format!("'{}' is not a token shard: {what}", path.display()))
                .help("make one with `relora-kit tokenize INPUT... -o SHARD.safetensors`")
        };
        let file = TensorFile::open(path).map_err(|e| match e.kind {
            // Text, most often: what its first bytes claim as a header is beside the point.
            Kind::Request if path.is_file() && path.extension().is_none_or(|e| e != "safetensors") => {
                refuse("it is no safetensors file".into())
            }
            _ => e,
        })?;
        let tensor = file.tensor_named(TENSOR).map_err(|e| refuse(e.message))?;
        if !matches!(tensor.dtype(), Dtype::U16 | Dtype::U32) || tensor.shape().len() != 1 {
            return Err(refuse(format!(
                "'{TENSOR}' is {:?} {:?}, expected U16 or U32 with one dimension",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        let (len, wide) = (tensor.elements(), tensor.dtype() == Dtype::U32);
        let vocab_size = file.metadata().get(VOCAB_SIZE).and_then(|v| v.parse().ok());
        let vocab_size = vocab_size.ok_or_else(|| refuse(format!("its metadata have no number '{VOCAB_SIZE}'")))?;
        let tokenizer_sha256 = file.metadata().get(TOKENIZER_SHA256).cloned();
        let tokenizer_path = file.metadata().get(TOKENIZER_PATH).map(PathBuf::from);
        Ok(TokenShard { source: Source::Shard(file), wide, len, vocab_size, tokenizer_sha256, tokenizer_path })
    }

    /// Such a file does not say how many ids there are: the largest tells.
    fn open_bin(path: &Path) -> Result<TokenShard> {
        let file = MappedFile::open(path)?;
        let BinLayout { ids, wide, largest } = bin_layout(path, file.bytes())?;
        let (len, vocab_size) = (ids.len() / if wide { 4 } else { 2 }, largest as usize + 1);
        let source = Source::Bin(file, ids);
        Ok(TokenShard { source, wide, len, vocab_size, tokenizer_sha256: None, tokenizer_path: None })
    }

    /// Refuses ids that a model with `vocab_size` ids does not have. A tokenizer may have more, such as an added token for
    /// padding: what counts is what occurs.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<()> {
        if self.vocab_size <= vocab_size {
            return Ok(());
        }
        let mut ids = Vec::new();
        for first in (0..self.len).step_by(SCAN) {
            ids.clear();
            self.read(first, SCAN.min(self.len - first), &mut ids)?;
            if let Some(i) = ids.iter().position(|&id| id as usize >= vocab_size) {
                return Err(Error::request(format!(
                    "'{}': token {} has id {}, the model's vocabulary has {vocab_size} ids (vocab_size of its config.json)",
                    self.path().display(),
                    first + i,
                    ids[i]
                ))
                .help("tokenize with the model's own tokenizer, or train a model of a larger vocab_size"));
            }
        }
        Ok(())
    }

    /// Refuses a model that comes with another `tokenizer.json` than the text was tokenized with. What is not known on
    /// either side cannot be compared.
    pub fn check_tokenizer(&self, model: &Path) -> Result<()> {
        let folder = if model.is_dir() { model } else { model.parent().unwrap_or(model) };
        let path = folder.join("tokenizer.json");
        let Some(expected) = self.tokenizer_sha256.as_ref().filter(|_| path.exists()) else { return Ok(()) };
        let found = sha256_file(&path)?;
        if *expected != found {
            return Err(Error::request(format!(
                "'{}' was made with another tokenizer than '{}': its tokenizer.json had sha256 {expected}, this one has {found}",
                self.path().display(),
                path.display()
            ))
            .help(format!("tokenize again with --tokenizer {}", folder.display())));
        }
        Ok(())
    }

    /// sha256 of the `tokenizer.json` it was made with, if it was.
    pub fn tokenizer_sha256(&self) -> Option<&str> {
        self.tokenizer_sha256.as_deref()
    }

    /// Where that `tokenizer.json` was when the shard was made.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        self.tokenizer_path.as_deref()
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Shard(file) => file.path(),
            Source::Bin(file, _) => file.path(),
        }
    }

    /// Appends tokens `first .. first + count` to `out`. Ids that exceed the shard's own vocabulary are refused.
    pub fn read(&self, first: usize, count: usize, out: &mut Vec<u32>) -> Result<()> {
        let bytes = match &self.source {
            Source::Shard(file) => file.tensor_named(TENSOR)?.bytes(),
            Source::Bin(file, range) => &file.bytes()[range.clone()],
        };
        let start = out.len();
        if self.wide {
            let bytes = &bytes[4 * first..4 * (first + count)];
            out.extend(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)));
        } else {
            let bytes = &bytes[2 * first..2 * (first + count)];
            out.extend(bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b))));
        }
        match out[start..].iter().position(|&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(i) => Err(Error::request(format!(
                "'{}': token {} has id {}, its vocabulary ends at {}",
                self.path().display(),
                first + i,
                out[start + i],
                self.vocab_size
            ))
            .help("tokenize the text again")),
        }
    }
}

/// The windows of a shard in training order: `max_length` consecutive tokens each, none overlapping. Every epoch visits
/// every window once, in an order drawn from the seed without storing it, so sample number `i` is known at once.
#[derive(Clone, Debug)]
pub struct Windows {
    /// First token of window 0.
    first: usize,
    /// Windows per epoch.
    count: u64,
    max_length: usize,
    /// `None`: in the order of the file.
    seed: Option<u64>,
}

impl Windows {
    /// Splits off the last `validation_fraction` of the windows: returns (training, validation).
    pub fn split(
        shard: &TokenShard,
        max_length: usize,
        seed: Option<u64>,
        validation_fraction: f64,
    ) -> Result<(Windows, Windows)> {
        let total = (shard.len() / max_length) as u64;
        let held_out = (total as f64 * validation_fraction).round() as u64;
        let training = total - held_out.min(total);
        if training == 0 {
            return Err(Error::request(format!(
                "'{}' holds {} tokens, expected at least one window of max_length {max_length} to train on",
                shard.path().display(),
                shard.len()
            ))
            .help("add text, or lower max_length or validation_fraction"));
        }
        let train = Windows { first: 0, count: training, max_length, seed };
        let validation =
            Windows { first: training as usize * max_length, count: total - training, max_length, seed: None };
        Ok((train, validation))
    }

    /// All windows of `shard`, in the order of the file, to evaluate on; `setting` is what `max_length` comes from, for messages.
    pub fn all(shard: &TokenShard, max_length: usize, setting: &str) -> Result<Windows> {
        let count = (shard.len() / max_length) as u64;
        if count == 0 {
            return Err(Error::request(format!(
                "'{}' holds {} tokens, fewer than one sequence of {setting} {max_length}",
                shard.path().display(),
                shard.len()
            ))
            .help(format!("add text, or lower {setting}")));
        }
        Ok(Windows { first: 0, count, max_length, seed: None })
    }

    /// Windows per epoch.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Tokens per window.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Appends the tokens of samples `sample .. sample + batch` (counted over all epochs) to `out`.
    pub fn read(&self, shard: &TokenShard, sample: u64, batch: usize, out: &mut Vec<u32>) -> Result<()> {
        for i in sample..sample + batch as u64 {
            let window = self.window(i) as usize;
            shard.read(self.first + window * self.max_length, self.max_length, out)?;
        }
        Ok(())
    }

    fn window(&self, sample: u64) -> u64 {
        let (epoch, i) = (sample / self.count, sample % self.count);
        self.seed.map_or(i, |seed| permute(i, self.count, seed.wrapping_add(mix(epoch))))
    }
}

/// A bijection of `0..n` drawn from `key`: a four-round Feistel network on the next even number of bits, walked until it
/// lands inside (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
fn permute(i: u64, n: u64, key: u64) -> u64 {
    let half_bits = (64 - n.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut x = i;
    loop {
        let (mut left, mut right) = (x >> half_bits, x & mask);
        for round in 0..4u64 {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ (round << 60))) & mask));
        }
        x = (left << half_bits) | right;
        if x < n {
            return x;
        }
    }
}

/// The splitmix64 step: a well-mixed number for every input.
pub(super) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bin_files_of_nanogpt_and_llm_c_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.bin");
        let header = |magic: i32, tokens: i32| -> Vec<u8> {
            [magic, 1, tokens].into_iter().chain([0; 253]).flat_map(i32::to_le_bytes).collect()
        };
        let ids = [5u32, 50256, 0, 7];
        let narrow: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
        let wide: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let files = [narrow.clone(), [header(20240520, 4), narrow].concat(), [header(20240801, 4), wide].concat()];
        for bytes in files {
            std::fs::write(&path, bytes).unwrap();
            let shard = TokenShard::open(&path).unwrap();
            assert_eq!((shard.len(), shard.vocab_size()), (4, 50257));
            let mut found = Vec::new();
            shard.read(1, 3, &mut found).unwrap();
            assert_eq!(found, ids[1..]);
        }
        for (bytes, words) in [
            (vec![1, 0, 2], "no whole number"),
            (vec![], "empty"),
            (header(20240520, 3), "its header says 3 tokens, the file holds 0"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = TokenShard::open(&path).err().unwrap();
            assert!(error.message.contains(words), "{error}");
        }
    }

    #[test]
    fn every_epoch_visits_every_window_once_in_another_order() {
        for count in [1, 2, 3, 64, 65, 1000] {
            let windows = Windows { first: 0, count, max_length: 8, seed: Some(7) };
            let epoch = |e: u64| (0..count).map(|i| windows.window(e * count + i)).collect::<Vec<_>>();
            let mut sorted = epoch(0);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            if count > 8 {
                assert_ne!(epoch(0), epoch(1));
                assert_ne!(epoch(0), sorted);
            }
        }
    }

    #[test]
    fn neighbours_in_training_are_spread_over_the_file() {
        let windows = Windows { first: 0, count: 10_000, max_length: 8, seed: Some(1) };
        let mean: f64 =
            (0..9_999).map(|i| windows.window(i).abs_diff(windows.window(i + 1)) as f64).sum::<f64>() / 9_999.0;
        // Two independent uniform numbers of 0..n are n/3 apart on average.
        assert!((mean - 3333.0).abs() < 100.0, "{mean}");
    }
}
