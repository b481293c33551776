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

/// What the metadata of a shard say about its ids.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Name of the tokenizer.
    pub tokenizer: &'static str,
    /// sha256 of the tokenizer.json, and its path if that is text.
    pub file: Option<(String, Option<String>)>,
    /// Ids are below this.
    pub vocab_size: usize,
    /// The id after each document, if it is known.
    pub end_of_document: Option<u32>,
}

impl Origin {
    /// Ids that `tokenizer` made.
    pub fn of(tokenizer: &Tokenizer) -> Origin {
        let path = tokenizer.path().and_then(|path| path.to_str()).map(str::to_owned);
        Origin {
            tokenizer: tokenizer.name(),
            file: tokenizer.sha256().map(|sha256| (sha256.to_owned(), path)),
            vocab_size: tokenizer.vocab_size(),
            end_of_document: Some(tokenizer.end_of_document()),
        }
    }
}

/// Appends ids to a safetensors file with the one tensor `tokens`.
pub struct ShardWriter<'a> {
    staged: &'a StagedFile,
    origin: Origin,
    header: usize,
    wide: bool,
    buffer: Vec<u8>,
    tokens: u64,
}

impl<'a> ShardWriter<'a> {
    /// U16 where the vocabulary fits, else U32.
    pub fn create(staged: &'a StagedFile, origin: Origin) -> Result<Self> {
        let wide = origin.vocab_size > 1 << 16;
        let path = origin.file.as_ref().and_then(|(_, path)| path.as_deref());
        let header = HEADER + json!(path).to_string().len().next_multiple_of(8);
        Ok(ShardWriter { staged, origin, header, wide, buffer: vec![b' '; 8 + header], tokens: 0 })
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
            (tokens::TOKENIZER): self.origin.tokenizer,
            (tokens::VOCAB_SIZE): self.origin.vocab_size.to_string(),
        });
        if let Some(end) = self.origin.end_of_document {
            metadata["end_of_document"] = end.to_string().into();
        }
        if let Some((sha256, path)) = &self.origin.file {
            metadata[tokens::TOKENIZER_SHA256] = sha256.as_str().into();
            if let Some(path) = path {
                metadata[tokens::TOKENIZER_PATH] = path.as_str().into();
            }
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
