//! What vocabularies of all kinds share, in GGUF and in a `tokenizer.json`.

use super::reader::Gguf;
use serde_json::{Map, Value, json};

/// What all kinds of vocabularies share.
pub struct Vocabulary<'a> {
    pub tokens: &'a [String],
    pub kinds: Vec<i64>,
    pub file: &'a Gguf,
}

/// ggml's token types.
pub const UNKNOWN: i64 = 2;
pub const CONTROL: i64 = 3;
pub const USER_DEFINED: i64 = 4;

/// The rules of a `tokenizer.json` that differ between kinds.
pub struct Rules {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub model: Value,
    /// Whether texts begin with the first token unless the file says otherwise.
    pub begins: bool,
}

/// The `model` of a BPE tokenizer; `more` are its further settings.
pub fn bpe(vocabulary: &Vocabulary, merges: Vec<Value>, more: Value) -> Value {
    let ids: Map<String, Value> = vocabulary.tokens.iter().cloned().zip((0..).map(|i: usize| i.into())).collect();
    let mut model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
    });
    if let (Value::Object(model), Value::Object(more)) = (&mut model, more) {
        model.extend(more);
        model.insert("vocab".into(), ids.into());
        model.insert("merges".into(), merges.into());
    }
    model
}
