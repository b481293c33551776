//! What turns text into ids: the bytes themselves, or a Hugging Face `tokenizer.json`.
//!
//! What is right is what `transformers.AutoTokenizer` gives (read at version 5.23): truncation and padding that a
//! `tokenizer.json` carries are off, and `add_bos_token` and `add_eos_token` of the `tokenizer_config.json`, where they
//! stand, decide which tokens a text gets around it, instead of the file's own template.

use crate::{
    error::{Error, Result},
    guard, inputs, interrupt,
    run::sha256_file,
};
use serde::de::IgnoredAny;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tokenizers::processors::template::TemplateProcessing;

/// Id of the byte tokenizer that ends a document.
pub const END_OF_DOCUMENT: u32 = 256;
/// Ids of the byte tokenizer.
pub const BYTE_VOCABULARY: usize = 257;

/// Bytes of the largest `tokenizer.json` that is read.
const MAX_BYTES: u64 = 1 << 30;

/// Seconds that a document may take, besides one for so many bytes: a tenth of the speed of any tokenizer in use. A pattern
/// of a `tokenizer.json` may try ways in number exponential in the text.
const LONGEST: u64 = 60;
const SLOWEST: u64 = 100_000;

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
    pub(super) inner: tokenizers::Tokenizer,
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
        let mut inner = read(&path)?;
        let config = SpecialTokens::read(&path)?;
        config.apply(&mut inner, &path)?;
        let end = match end_of_document.or(config.eos.as_deref()) {
            Some(token) => inner.token_to_id(token).ok_or_else(|| {
                Error::request(format!("'{}' has no token '{token}' to end documents with", path.display()))
                    .help("name one that it has with --end-of-document TOKEN")
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
        self.ids(text, false)
    }

    /// The ids of `text` with the special tokens that the tokenizer puts around a text, such as `<s>` in front. The byte
    /// tokenizer has none.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    fn ids(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>> {
        match self {
            Tokenizer::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::HuggingFace(v) => {
                let seconds = LONGEST + text.len() as u64 / SLOWEST;
                let _limit = interrupt::time_limit(Duration::from_secs(seconds), &v.path);
                guard::caught(&v.path, "tokenizer.json", || {
                    let encoding = v.inner.encode_fast(text, special_tokens);
                    Ok(encoding.map_err(|e| Error::request(format!("cannot tokenize: {e}")))?.get_ids().to_vec())
                })
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
            Tokenizer::HuggingFace(v) => guard::caught(&v.path, "tokenizer.json", || {
                v.inner.decode(ids, false).map_err(|e| Error::request(format!("cannot decode: {e}")))
            }),
        }
    }
}

/// Reads a `tokenizer.json`, with truncation and padding off.
fn read(path: &Path) -> Result<tokenizers::Tokenizer> {
    let help = "copy or download it again, or save it with tokenizer.save_pretrained(FOLDER)";
    let bytes = inputs::read(path, MAX_BYTES)?;
    // The library unwinds on some files that are not JSON; and its own error names no place.
    serde_json::from_slice::<IgnoredAny>(&bytes)
        .map_err(|e| Error::request(format!("'{}' is not a tokenizer.json: {e}", path.display())).help(help))?;
    let mut inner = guard::caught(path, "tokenizer.json", || {
        tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::request(format!("'{}' is not a tokenizer.json: {e}", path.display())).help(help))
    })?;
    inner.with_padding(None);
    let off = inner.with_truncation(None).map(|_| ());
    off.map_err(|e| Error::request(format!("'{}': {e}", path.display())))?;
    Ok(inner)
}

/// What the files beside a `tokenizer.json` say about special tokens.
#[derive(Debug, Default)]
struct SpecialTokens {
    bos: Option<String>,
    eos: Option<String>,
    /// `add_bos_token` and `add_eos_token`, if one of them is there.
    around: Option<(bool, bool)>,
}

impl SpecialTokens {
    fn read(tokenizer: &Path) -> Result<SpecialTokens> {
        let config = optional_json(&tokenizer.with_file_name("tokenizer_config.json"))?;
        // Older versions of transformers wrote it; the other file wins.
        let map = optional_json(&tokenizer.with_file_name("special_tokens_map.json"))?;
        let token = |name: &str| {
            // A string, or an object with `content`.
            let text = |t: &Value| t.as_str().or_else(|| t["content"].as_str()).map(str::to_owned);
            text(&config[name]).or_else(|| text(&map[name]))
        };
        let (add_bos, add_eos) = (&config["add_bos_token"], &config["add_eos_token"]);
        // transformers drops both flags where a tokenizer.json is loaded by its general class: the file's own template counts.
        let general =
            ["PreTrainedTokenizerFast", "TokenizersBackend"].iter().any(|class| config["tokenizer_class"] == *class);
        let given = !general && (!add_bos.is_null() || !add_eos.is_null());
        let around = given.then_some((*add_bos == true, *add_eos == true));
        Ok(SpecialTokens { bos: token("bos_token"), eos: token("eos_token"), around })
    }

    /// Puts the template in place that `add_bos_token` and `add_eos_token` ask for (`update_post_processor` in
    /// `tokenization_utils_tokenizers.py`: a token without a name is left out).
    fn apply(&self, inner: &mut tokenizers::Tokenizer, path: &Path) -> Result<()> {
        let Some((add_bos, add_eos)) = self.around else { return Ok(()) };
        let token = |add: bool, name: &Option<String>| -> Result<Option<(String, u32)>> {
            let Some(name) = name.as_ref().filter(|_| add) else { return Ok(None) };
            match inner.token_to_id(name) {
                Some(id) => Ok(Some((name.clone(), id))),
                None => Err(Error::request(format!(
                    "'{}' has no token '{name}', which its tokenizer_config.json puts around texts",
                    path.display()
                ))
                .help("mend bos_token, eos_token, add_bos_token or add_eos_token in the tokenizer_config.json")),
            }
        };
        let (bos, eos) = (token(add_bos, &self.bos)?, token(add_eos, &self.eos)?);
        let piece = |id: u32| format!("special-{id}");
        let before = bos.iter().map(|(_, id)| piece(*id));
        let single: Vec<String> = before.chain(["$A".to_owned()]).chain(eos.iter().map(|(_, id)| piece(*id))).collect();
        let special: Vec<(String, u32)> = bos.iter().chain(&eos).map(|(_, id)| (piece(*id), *id)).collect();
        let wrong = |e: String| Error::request(format!("'{}': {e}", path.display()));
        let template = TemplateProcessing::builder()
            .try_single(single)
            .map_err(wrong)?
            .special_tokens(special)
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        inner.with_post_processor(Some(template));
        Ok(())
    }
}

/// Null if there is no such file.
fn optional_json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
            Error::request(format!("'{}' is not valid JSON: {e}", path.display())).help("copy or download it again")
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
        // A copy that was cut short, also where the library itself unwinds.
        for part in ["{", "\"added_tokens\"", "\"decoder\"", "\"type\"", "\"merges\""] {
            let at = json.rfind(part).unwrap() + part.len() + 3;
            fs::write(&path, &json[..at]).unwrap();
            let error = Tokenizer::load(&path, None).err().unwrap();
            assert!(error.message.contains("is not a tokenizer.json: EOF"), "{error}");
        }
        fs::write(&path, json.replacen("\"decoder\"", "\"deco\u{1}der\"", 1)).unwrap();
        assert!(Tokenizer::load(&path, None).err().unwrap().message.contains("control character"));
        fs::write(&path, "{}").unwrap();
        assert!(Tokenizer::load(&path, None).err().unwrap().message.contains("is not a tokenizer.json"));
    }

    /// A copy of the fixture with `keys` set, and its configuration.
    fn changed(keys: &[(&str, Value)], config: Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut json: Value = serde_json::from_slice(&fs::read(fixture().join("tokenizer.json")).unwrap()).unwrap();
        for (key, value) in keys {
            json[key] = value.clone();
        }
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        folder
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_off() {
        let truncation = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        let padding = |strategy: Value| {
            json!({"strategy": strategy, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|endoftext|>"})
        };
        let text = "Licensed under the Apache License";
        let expected = Tokenizer::load(&fixture(), None).unwrap().encode(text).unwrap();
        assert!(expected.len() > 4);
        for keys in [
            vec![("truncation", truncation.clone())],
            vec![("padding", padding(json!({"Fixed": 64})))],
            vec![("padding", padding("BatchLongest".into()))],
            vec![("truncation", truncation), ("padding", padding(json!({"Fixed": 64})))],
        ] {
            let folder = changed(&keys, json!({"eos_token": "<|endoftext|>"}));
            let tokenizer = Tokenizer::load(folder.path(), None).unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), expected, "{keys:?}");
            assert_eq!(tokenizer.encode_with_special_tokens(text).unwrap(), expected, "{keys:?}");
        }
    }

    #[test]
    fn texts_get_the_special_tokens_that_transformers_gives_them() {
        let template = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "e", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"e": {"id": "e", "ids": [72], "tokens": ["e"]}}});
        let plain = Tokenizer::load(&fixture(), None).unwrap().encode("text").unwrap();
        let around = |before: &[u32], after: &[u32]| [before, &plain, after].concat();
        let end = "<|endoftext|>";
        for (template, config, expected) in [
            (Value::Null, json!({"eos_token": end}), around(&[], &[])),
            (template.clone(), json!({"eos_token": end}), around(&[72], &[])),
            // What the configuration says replaces the template.
            (template.clone(), json!({"eos_token": end, "bos_token": end, "add_bos_token": true}), around(&[0], &[])),
            (template.clone(), json!({"eos_token": end, "add_bos_token": false}), around(&[], &[])),
            (template.clone(), json!({"eos_token": {"content": end}, "add_eos_token": true}), around(&[], &[0])),
            // The general class does not look at it.
            (
                template.clone(),
                json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "add_bos_token": true}),
                around(&[72], &[]),
            ),
            // A token without a name is left out.
            (template, json!({"eos_token": end, "add_bos_token": true}), around(&[], &[])),
        ] {
            let folder = changed(&[("post_processor", template)], config.clone());
            let tokenizer = Tokenizer::load(folder.path(), None).unwrap();
            assert_eq!(tokenizer.encode_with_special_tokens("text").unwrap(), expected, "{config}");
            assert_eq!(tokenizer.encode("text").unwrap(), plain, "{config}");
        }
        let folder = changed(&[], json!({"eos_token": end, "bos_token": "<none>", "add_bos_token": true}));
        let error = Tokenizer::load(folder.path(), None).err().unwrap();
        assert!(error.message.contains("no token '<none>'"), "{error}");
    }

    #[test]
    fn files_beside_it_that_are_damaged_are_refused() {
        let folder = changed(&[], json!({"eos_token": "<|endoftext|>"}));
        fs::write(folder.path().join("tokenizer_config.json"), "{\"eos_token\": ").unwrap();
        let error = Tokenizer::load(folder.path(), None).err().unwrap();
        assert!(error.message.contains("tokenizer_config.json' is not valid JSON"), "{error}");
        fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
        fs::write(folder.path().join("special_tokens_map.json"), "{\"eos_token\": \"e\"}").unwrap();
        let tokenizer = Tokenizer::load(folder.path(), None).unwrap();
        assert_eq!(vec![tokenizer.end_of_document()], tokenizer.encode("e").unwrap());
    }
}
