//! Token ids on disk and the order in which training sees them.
//!
//! A token shard is a safetensors file with one integer tensor `tokens` (U16 or U32, one dimension); its metadata say
//! which tokenizer made it and how many different ids there can be. It is memory-mapped like every other checkpoint.

use crate::{
    checkpoint::{Dtype, TensorFile},
    error::{Error, Result},
};
use serde::{Deserialize, Deserializer, Serialize};
use std::path::Path;

/// Name of the tensor in a token shard.
pub const TENSOR: &str = "tokens";
/// Metadata key: what turned text into ids.
pub const TOKENIZER: &str = "tokenizer";
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
    file: TensorFile,
    len: usize,
    vocab_size: usize,
}

impl TokenShard {
    /// Opens and checks a shard made by `relora-kit tokenize`.
    pub fn open(path: &Path) -> Result<TokenShard> {
        let file = TensorFile::open(path)?;
        let refuse = |what: String| {
            Error::request(format!("'{}' is not a token shard: {what}", path.display()))
                .help("make one with `relora-kit tokenize INPUT... -o SHARD.safetensors`")
        };
        let tensor = file.tensor_named(TENSOR).map_err(|e| refuse(e.message))?;
        if !matches!(tensor.dtype(), Dtype::U16 | Dtype::U32) || tensor.shape().len() != 1 {
            return Err(refuse(format!(
                "'{TENSOR}' is {:?} {:?}, expected U16 or U32 with one dimension",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        let len = tensor.elements();
        let vocab_size = file.metadata().get(VOCAB_SIZE).and_then(|v| v.parse().ok());
        let vocab_size = vocab_size.ok_or_else(|| refuse(format!("its metadata have no number '{VOCAB_SIZE}'")))?;
        Ok(TokenShard { file, len, vocab_size })
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
        self.file.path()
    }

    /// Appends tokens `first .. first + count` to `out`. Ids that exceed the shard's own vocabulary are refused.
    pub fn read(&self, first: usize, count: usize, out: &mut Vec<u32>) -> Result<()> {
        let tensor = self.file.tensor_named(TENSOR)?;
        let start = out.len();
        match tensor.dtype() {
            Dtype::U16 => {
                let bytes = &tensor.bytes()[2 * first..2 * (first + count)];
                out.extend(bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b))));
            }
            _ => {
                let bytes = &tensor.bytes()[4 * first..4 * (first + count)];
                out.extend(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)));
            }
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
