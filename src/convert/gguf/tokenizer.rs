//! `tokenizer.json` and `tokenizer_config.json` from a GGUF file's vocabulary: byte-level BPE (`gpt2`) here, the
//! sentencepiece kind (`llama`) in [`super::sentencepiece`].
//!
//! Format: the JSON of the `tokenizers` library. A vocabulary whose rules are not known exactly is left out, with the reason.

use super::{
    reader::Gguf,
    sentencepiece,
    vocabulary::{CONTROL, Rules, UNKNOWN, USER_DEFINED, Vocabulary, bpe},
};
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// The two files.
pub struct Tokenizer {
    /// `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json`.
    pub config: Value,
}

/// Bytes of a token. Llama 3's longest has 128; the merges of a longer one would take a time that grows with its square.
const MAX_TOKEN: usize = 512;

/// Llama 3's and Qwen2's ways to cut a text into words; they differ in how many digits stay together.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Builds both files. The inner error is the reason why this vocabulary is left out.
pub fn build(file: &Gguf, vocabulary: usize) -> Result<std::result::Result<Tokenizer, String>> {
    let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(Err("the file holds none".into())) };
    let Some(tokens) = file.texts("tokenizer.ggml.tokens")? else { return Ok(Err("the file holds no tokens".into())) };
    if tokens.len() > vocabulary {
        return Ok(Err(format!("it has {} tokens, the embedding only {vocabulary}", tokens.len())));
    }
    if let Some(token) = tokens.iter().find(|t| t.len() > MAX_TOKEN) {
        return Ok(Err(format!("a token of {} bytes is longer than any known one ({MAX_TOKEN})", token.len())));
    }
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some(twice) = tokens.iter().find(|t| !seen.insert(t.as_str())) {
        return Ok(Err(format!("token {twice:?} stands twice in its vocabulary")));
    }
    let kinds = match file.metadata.get("tokenizer.ggml.token_type") {
        Some(super::reader::Value::Ints(kinds)) if kinds.len() == tokens.len() => kinds.clone(),
        None => vec![1; tokens.len()],
        Some(_) => return Ok(Err("its token types do not fit its tokens".into())),
    };
    let vocabulary = Vocabulary { tokens, kinds, file };
    let rules = match model {
        "gpt2" => byte_level(&vocabulary)?,
        "llama" => sentencepiece::rules(&vocabulary)?,
        other => Err(format!("vocabularies of the kind '{other}' are not supported, expected gpt2 or llama")),
    };
    Ok(match rules {
        Ok(rules) => Ok(vocabulary.assemble(rules)?),
        Err(reason) => Err(reason),
    })
}

fn byte_level(vocabulary: &Vocabulary) -> Result<std::result::Result<Rules, String>> {
    let file = vocabulary.file;
    let Some(merges) = file.texts("tokenizer.ggml.merges")? else {
        return Ok(Err("the file holds no merges".into()));
    };
    let pre = file.text("tokenizer.ggml.pre")?.unwrap_or("missing");
    let bytes = |regex: bool, trim: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim, "use_regex": regex});
    let split = |digits: &str| json!({"type": "Split", "pattern": {"Regex": WORDS.replace("{DIGITS}", digits)}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: [Value; 2]| json!({"type": "Sequence", "pretokenizers": steps});
    let (normalizer, pre_tokenizer) = match pre {
        "gpt-2" => (Value::Null, bytes(true, true)),
        "smollm" => (Value::Null, sequence([json!({"type": "Digits", "individual_digits": true}), bytes(true, true)])),
        "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, sequence([split("{1,3}"), bytes(false, true)])),
        "qwen2" => (json!({"type": "NFC"}), sequence([split(""), bytes(false, false)])),
        other => {
            return Ok(Err(format!(
                "its way to cut words (tokenizer.ggml.pre) is '{other}'; known are gpt-2, smollm, llama-bpe and qwen2"
            )));
        }
    };
    let llama3 = pre.starts_with("llama");
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        // Byte-level tokens hold no space.
        match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                pairs.push(json!([left, right]));
            }
            _ => return Ok(Err(format!("{merge:?} is no merge of two tokens"))),
        }
    }
    let model = bpe(vocabulary, pairs, json!({"fuse_unk": false, "byte_fallback": false, "ignore_merges": llama3}));
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    Ok(Ok(Rules { normalizer, pre_tokenizer, decoder, model, begins: llama3 }))
}

impl Vocabulary<'_> {
    fn assemble(&self, rules: Rules) -> Result<Tokenizer> {
        let file = self.file;
        let token = |name: &str| -> Result<Option<(usize, &str)>> {
            let id = file.count(&format!("tokenizer.ggml.{name}_token_id"))?;
            Ok(id.and_then(|id| Some((id, self.tokens.get(id)?.as_str()))))
        };
        let (bos, eos) = (token("bos")?, token("eos")?);
        let begins = file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(rules.begins).then_some(bos).flatten();
        let ends = file.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false).then_some(eos).flatten();
        let added: Vec<Value> = (0..self.tokens.len())
            .filter(|&i| [UNKNOWN, CONTROL, USER_DEFINED].contains(&self.kinds[i]))
            .map(|i| {
                json!({"id": i, "content": self.tokens[i], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": self.kinds[i] != USER_DEFINED})
            })
            .collect();
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": rules.normalizer,
            "pre_tokenizer": rules.pre_tokenizer,
            "post_processor": template(begins, ends),
            "decoder": rules.decoder,
            "model": rules.model,
        });
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": begins.is_some(),
            "add_eos_token": ends.is_some(),
            "clean_up_tokenization_spaces": false,
        });
        for (key, name) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some((_, text)) = token(name)? {
                config[key] = text.into();
            }
        }
        if let Some(template) = file.text("tokenizer.chat_template")? {
            config["chat_template"] = template.into();
        }
        Ok(Tokenizer { tokenizer, config })
    }
}

/// What is put around every text.
fn template(begins: Option<(usize, &str)>, ends: Option<(usize, &str)>) -> Value {
    if begins.is_none() && ends.is_none() {
        return Value::Null;
    }
    let special =
        |token: Option<(usize, &str)>| token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": 0}}));
    let text = |which: &str| Some(json!({"Sequence": {"id": which, "type_id": 0}}));
    let around = |which: &str| [special(begins), text(which), special(ends)].into_iter().flatten().collect::<Vec<_>>();
    let mut tokens = Map::new();
    for (id, text) in begins.into_iter().chain(ends) {
        tokens.insert(text.into(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    let (single, pair) = (around("A"), [around("A"), around("B")].concat());
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::reader::Value as Stored, *};
    use std::path::Path;

    #[test]
    fn merges_come_in_the_order_of_what_they_make() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf/types.gguf");
        let mut file = Gguf::open(&path).unwrap();
        let tokens = ["<unk>", "<s>", "\u{2581}", "a", "b", "\u{2581}ab", "ab", "<0x41>"].map(str::to_owned).to_vec();
        for (key, value) in [
            ("model", Stored::Text("llama".into())),
            ("tokens", Stored::Texts(tokens)),
            ("token_type", Stored::Ints(vec![2, 3, 1, 1, 1, 1, 1, 6])),
            ("scores", Stored::Floats(vec![0.0, 0.0, -1.0, -2.0, -3.0, -0.7, -0.5, 0.0])),
            ("bos_token_id", Stored::Int(1)),
            ("eos_token_id", Stored::Int(1)),
        ] {
            file.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        }
        let built = build(&file, 32).unwrap().ok().unwrap().tokenizer;
        assert_eq!(built["model"]["merges"], json!([["a", "b"], ["\u{2581}", "ab"]]));
        assert_eq!((&built["model"]["unk_token"], &built["model"]["byte_fallback"]), (&"<unk>".into(), &true.into()));
        assert_eq!(built["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
        let mut other = |key: &str, value: Stored| {
            let key = format!("tokenizer.ggml.{key}");
            let before = file.metadata.insert(key.clone(), value);
            let reason = build(&file, 32).unwrap().err().unwrap();
            match before {
                Some(before) => file.metadata.insert(key, before),
                None => file.metadata.remove(&key),
            };
            reason
        };
        assert!(other("remove_extra_whitespaces", Stored::Bool(true)).contains("joins neighbouring spaces"));
        assert!(other("precompiled_charsmap", Stored::Ints(vec![1])).contains("replaces characters"));
        file.metadata.insert("tokenizer.ggml.scores".into(), Stored::Floats(vec![0.0]));
        assert_eq!(build(&file, 32).unwrap().err().unwrap(), "its tokens have no scores");
        assert!(build(&file, 4).unwrap().err().unwrap().contains("8 tokens, the embedding only 4"));
    }
}
