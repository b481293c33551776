//! A token shard written front to back, its length unknown until the end.

use super::Tokenizer;
use crate::{
    error::{Error, Result},
    staged::StagedFile,
    train::tokens,
};
use serde_json::json;
use std::{io::Write, os::unix::fs::FileExt};

/// Bytes that the header may take besides a path, a multiple of 8; what it leaves over is filled with spaces, as the format
/// allows.
const HEADER: usize = 512;

/// Appends ids to a safetensors file with the one tensor `tokens`.
pub struct ShardWriter<'a> {
    staged: &'a StagedFile,
    tokenizer: &'a Tokenizer,
    /// Path of the tokenizer.json, if it is text.
    path: Option<&'a str>,
    header: usize,
    wide: bool,
    buffer: Vec<u8>,
    tokens: u64,
}

impl<'a> ShardWriter<'a> {
    /// U16 where the vocabulary fits, else U32.
    pub fn create(staged: &'a StagedFile, tokenizer: &'a Tokenizer) -> Result<Self> {
        let wide = tokenizer.vocab_size() > 1 << 16;
        let path = tokenizer.path().and_then(|path| path.to_str());
        let header = HEADER + json!(path).to_string().len().next_multiple_of(8);
        Ok(ShardWriter { staged, tokenizer, path, header, wide, buffer: vec![b' '; 8 + header], tokens: 0 })
    }

    /// Writes ids after those before.
    pub fn append(&mut self, ids: &[u32]) -> Result<()> {
        if self.wide {
            self.buffer.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        } else {
            self.buffer.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
        }
        self.tokens += ids.len() as u64;
        if self.buffer.len() > 1 << 20 {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the rest and the header. Returns the number of tokens.
    pub fn finish(mut self) -> Result<u64> {
        self.flush()?;
        let mut metadata = json!({
            (tokens::TOKENIZER): self.tokenizer.name(),
            (tokens::VOCAB_SIZE): self.tokenizer.vocab_size().to_string(),
            "end_of_document": self.tokenizer.end_of_document().to_string(),
        });
        if let Some(sha256) = self.tokenizer.sha256() {
            metadata[tokens::TOKENIZER_SHA256] = sha256.into();
        }
        if let Some(path) = self.path {
            metadata[tokens::TOKENIZER_PATH] = path.into();
        }
        let (dtype, width) = if self.wide { ("U32", 4) } else { ("U16", 2) };
        let tensor = json!({"dtype": dtype, "shape": [self.tokens], "data_offsets": [0, width * self.tokens]});
        let json = json!({"__metadata__": metadata, (tokens::TENSOR): tensor}).to_string();
        if json.len() > self.header {
            let (len, room) = (json.len(), self.header);
            return Err(Error::environment(format!("the header of a token shard takes {len} bytes of {room}")));
        }
        let header = [&(self.header as u64).to_le_bytes(), json.as_bytes()].concat();
        let path = self.staged.target();
        self.staged.file().write_all_at(&header, 0).map_err(|e| Error::io("write", path, e))?;
        Ok(self.tokens)
    }

    fn flush(&mut self) -> Result<()> {
        let mut file = self.staged.file();
        file.write_all(&self.buffer).map_err(|e| Error::io("write", self.staged.target(), e))?;
        self.buffer.clear();
        Ok(())
    }
}
