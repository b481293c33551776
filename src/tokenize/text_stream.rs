//! Text out of ids that come one by one.

use super::Tokenizer;
use crate::error::{Error, Result};

/// The text of ids that come one by one, at a cost per id that does not grow with the text.
pub struct TextStream<'a>(Box<dyn FnMut(u32) -> Result<String> + 'a>);

impl TextStream<'_> {
    /// What `id` adds to the text. A character of several ids comes with the last of them.
    pub fn push(&mut self, id: u32) -> Result<String> {
        (self.0)(id)
    }
}

impl Tokenizer {
    /// Begins the text that follows the ids `before`: what an id adds depends on what comes before it, such as the space in
    /// front of a word of SentencePiece, which belongs to all words but the first. What an incomplete character at the
    /// text's end is decoded to is in [`Tokenizer::decode_after`] alone.
    pub fn stream_after(&self, before: &[u32]) -> Result<TextStream<'_>> {
        let mut stream = self.stream();
        before.iter().try_for_each(|&id| stream.push(id).map(drop))?;
        Ok(stream)
    }

    /// The text that `ids` add to that of `before`.
    pub fn decode_after(&self, before: &[u32], ids: &[u32]) -> Result<String> {
        let whole = self.decode(&[before, ids].concat())?;
        match whole.strip_prefix(&self.decode(before)?) {
            Some(text) => Ok(text.to_owned()),
            // The end of `before` reads otherwise together with what follows it.
            None => self.decode(ids),
        }
    }

    fn stream(&self) -> TextStream<'_> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    fn fixture() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokenizer")
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

    /// A vocabulary of SentencePiece's kind, as Llama 2's `tokenizer.json` has it.
    fn sentencepiece(folder: &Path) -> Tokenizer {
        let tokens = ["<unk>", "<s>", "</s>", "\u{2581}", "\u{2581}a", "b", "\u{2581}b", "<0xC3>", "<0xA9>"];
        let vocabulary: serde_json::Map<String, serde_json::Value> =
            tokens.iter().zip(0..).map(|(t, i)| ((*t).to_owned(), i.into())).collect();
        let special = |i: usize| {
            serde_json::json!({"id": i, "content": tokens[i], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1), special(2)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocabulary,
                "merges": [["\u{2581}", "b"]]},
        });
        fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::load(folder, None).unwrap()
    }

    #[test]
    fn a_word_that_follows_keeps_its_space() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = sentencepiece(folder.path());
        for (before, ids, expected) in [
            (&[4][..], &[4, 5, 6][..], " ab b"),
            (&[1, 4], &[6, 7, 8], " b\u{e9}"),
            (&[], &[4, 6], "a b"),
            (&[4, 3], &[5, 4], "b a"),
            (&[4, 7, 8], &[4], " a"),
        ] {
            let mut stream = tokenizer.stream_after(before).unwrap();
            let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert_eq!(pieces.concat(), expected, "{before:?} {ids:?}");
            assert_eq!(tokenizer.decode_after(before, ids).unwrap(), expected, "{before:?} {ids:?}");
        }
        // Half of a character at the end.
        assert_eq!(tokenizer.decode_after(&[4], &[4, 7]).unwrap(), " a\u{fffd}");
    }
}
