//! What turns text into ids: the bytes themselves, or a Hugging Face `tokenizer.json`.

use crate::{
    error::{Error, Result},
    run::sha256_file,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Id of the byte tokenizer that ends a document.
pub const END_OF_DOCUMENT: u32 = 256;
/// Ids of the byte tokenizer.
pub const BYTE_VOCABULARY: usize = 257;

/// Tokens that end a document in common vocabularies, for a `tokenizer.json` without a `tokenizer_config.json`.
const COMMON_ENDS: [&str; 3] = ["<|endoftext|>", "<|end_of_text|>", "</s>"];

/// Text to ids and back.
pub enum Tokenizer {
    /// Ids 0-255 are the bytes of the UTF-8 text, 256 ends a document. Needs no vocabulary.
    Bytes,
    /// The vocabulary and rules of a `tokenizer.json`.
    HuggingFace(Box<Vocabulary>),
}

/// A loaded `tokenizer.json`.
pub struct Vocabulary {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    sha256: String,
    end: u32,
    size: usize,
}

impl Tokenizer {
    /// `bytes`, a `tokenizer.json`, or a folder that holds one. `end_of_document` names the token after each document;
    /// by default it is `eos_token` of the `tokenizer_config.json` beside it, or a common name that the vocabulary has.
    pub fn load(name: &Path, end_of_document: Option<&str>) -> Result<Tokenizer> {
        if name == Path::new("bytes") {
            return match end_of_document {
                None => Ok(Tokenizer::Bytes),
                Some(_) => Err(Error::request("the byte tokenizer has its own end of a document, id 256")
                    .help("leave --end-of-document out, or give a --tokenizer")),
            };
        }
        let path = if name.is_dir() { name.join("tokenizer.json") } else { name.to_owned() };
        let sha256 = sha256_file(&path)
            .map_err(|e| e.help("--tokenizer takes `bytes`, a tokenizer.json, or a folder that holds one"))?;
        let inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|e| Error::request(format!("'{}' is not a tokenizer.json: {e}", path.display())))?;
        let named =
            end_of_document.map(str::to_owned).or_else(|| eos_token(&path.with_file_name("tokenizer_config.json")));
        let end = match &named {
            Some(token) => inner.token_to_id(token).ok_or_else(|| {
                Error::request(format!("'{}' has no token '{token}' to end documents with", path.display()))
            })?,
            None => COMMON_ENDS.iter().find_map(|token| inner.token_to_id(token)).ok_or_else(|| {
                Error::request(format!("'{}' does not say which token ends a document", path.display()))
                    .help("name it with --end-of-document TOKEN")
            })?,
        };
        let vocabulary = inner.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        let path = std::path::absolute(&path).map_err(|e| Error::io("find", &path, e))?;
        Ok(Tokenizer::HuggingFace(Box::new(Vocabulary { inner, path, sha256, end, size })))
    }

    /// What a shard's metadata call it.
    pub fn name(&self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
            Tokenizer::HuggingFace(_) => "tokenizer.json",
        }
    }

    /// sha256 of the `tokenizer.json`, in hexadecimal digits.
    pub fn sha256(&self) -> Option<&str> {
        match self {
            Tokenizer::Bytes => None,
            Tokenizer::HuggingFace(v) => Some(&v.sha256),
        }
    }

    /// The whole path of the `tokenizer.json`.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Tokenizer::Bytes => None,
            Tokenizer::HuggingFace(v) => Some(&v.path),
        }
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => BYTE_VOCABULARY,
            Tokenizer::HuggingFace(v) => v.size,
        }
    }

    /// The id after each document.
    pub fn end_of_document(&self) -> u32 {
        match self {
            Tokenizer::Bytes => END_OF_DOCUMENT,
            Tokenizer::HuggingFace(v) => v.end,
        }
    }

    /// The ids of `text`, without special tokens around them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Tokenizer::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::HuggingFace(v) => {
                let encoding = v.inner.encode_fast(text, false);
                Ok(encoding.map_err(|e| Error::request(format!("cannot tokenize: {e}")))?.get_ids().to_vec())
            }
        }
    }

    /// The text of `ids`; bytes that are no UTF-8 are replaced.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match self {
            Tokenizer::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Tokenizer::HuggingFace(v) => {
                v.inner.decode(ids, false).map_err(|e| Error::request(format!("cannot decode: {e}")))
            }
        }
    }
}

/// The text of ids that come one by one, at a cost per id that does not grow with the text.
pub struct TextStream<'a>(Box<dyn FnMut(u32) -> Result<String> + 'a>);

impl TextStream<'_> {
    /// What `id` adds to the text. A character of several ids comes with the last of them.
    pub fn push(&mut self, id: u32) -> Result<String> {
        (self.0)(id)
    }
}

impl Tokenizer {
    /// Begins a text. What an incomplete character at its end is decoded to is in [`Tokenizer::decode`] of all ids alone.
    pub fn stream(&self) -> TextStream<'_> {
        match self {
            Tokenizer::Bytes => {
                let mut pending = Vec::new();
                TextStream(Box::new(move |id| {
                    pending.extend(u8::try_from(id).ok());
                    Ok(complete_text(&mut pending))
                }))
            }
            Tokenizer::HuggingFace(v) => {
                let mut stream = v.inner.decode_stream(false);
                TextStream(Box::new(move |id| {
                    let piece = stream.step(id).map_err(|e| Error::request(format!("cannot decode: {e}")))?;
                    Ok(piece.unwrap_or_default())
                }))
            }
        }
    }
}

/// Takes what is certain from the front of `bytes`: all but the beginning of a character.
fn complete_text(bytes: &mut Vec<u8>) -> String {
    let incomplete = match bytes.utf8_chunks().last() {
        // Invalid whatever follows, or only cut off?
        Some(chunk) => match std::str::from_utf8(chunk.invalid()) {
            Err(e) if e.error_len().is_none() => chunk.invalid().len(),
            _ => 0,
        },
        None => 0,
    };
    let rest = bytes.split_off(bytes.len() - incomplete);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

/// `eos_token` of a `tokenizer_config.json`: a string, or an object with `content`.
fn eos_token(path: &Path) -> Option<String> {
    let config: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let token = &config["eos_token"];
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokenizer")
    }

    #[test]
    fn ids_are_those_of_hugging_face() {
        let tokenizer = Tokenizer::load(&fixture(), None).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_document()), (400, 0));
        let expected: Value = serde_json::from_slice(&fs::read(fixture().join("expected.json")).unwrap()).unwrap();
        for case in expected.as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(serde_json::json!(ids), case["ids"], "{text}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn a_stream_gives_characters_when_they_are_complete() {
        let mut stream = Tokenizer::Bytes.stream();
        let pieces: Vec<String> =
            b"a\xc3\xa9\xff\xe2\x82x\xe2\x82".iter().map(|&b| stream.push(b.into()).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "\u{e9}", "\u{fffd}", "", "", "\u{fffd}x", "", ""]);

        let tokenizer = Tokenizer::load(&fixture(), None).unwrap();
        let text = "na\u{ef}ve \u{1f600} text, twice: \u{1f600}\u{1f600}.";
        let ids = tokenizer.encode(text).unwrap();
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(!pieces.iter().any(|p| p.contains('\u{fffd}')) && pieces.contains(&String::new()), "{pieces:?}");
    }

    #[test]
    fn the_end_of_a_document_is_named_found_or_refused() {
        let named = |token| Tokenizer::load(&fixture().join("tokenizer.json"), Some(token));
        assert_eq!(named("e").unwrap().end_of_document(), named("e").unwrap().encode("e").unwrap()[0]);
        assert!(named("</nothing>").err().unwrap().message.contains("no token '</nothing>'"));
        assert!(Tokenizer::load(Path::new("bytes"), Some("x")).is_err());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let json = fs::read_to_string(fixture().join("tokenizer.json")).unwrap();
        fs::write(&path, json.replace("<|endoftext|>", "<|stop|>")).unwrap();
        let error = Tokenizer::load(&path, None).err().unwrap();
        assert!(error.message.contains("does not say which token ends a document"), "{error}");
        fs::write(&path, "{}").unwrap();
        assert!(Tokenizer::load(&path, None).err().unwrap().message.contains("is not a tokenizer.json"));
    }
}
