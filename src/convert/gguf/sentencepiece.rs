//! Vocabularies of sentencepiece's BPE kind (`tokenizer.ggml.model` = `llama`), as Hugging Face's Llama 2 tokenizer.

use super::{
    reader::Value as Stored,
    vocabulary::{Rules, UNKNOWN, Vocabulary, bpe},
};
use crate::error::Result;
use serde_json::{Value, json};
use std::collections::HashMap;

/// What sentencepiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Sentencepiece merges the neighbours whose union has the best score. A list of merges in the order of the scores of
/// what they make does the same, which is how transformers converts these vocabularies (`generate_merges`).
pub(super) fn rules(vocabulary: &Vocabulary) -> Result<std::result::Result<Rules, String>> {
    let (tokens, file) = (vocabulary.tokens, vocabulary.file);
    let scores = match file.metadata.get("tokenizer.ggml.scores") {
        Some(Stored::Floats(scores)) if scores.len() == tokens.len() => scores,
        _ => return Ok(Err("its tokens have no scores".into())),
    };
    // Both belong to vocabularies of other kinds; a file of this kind that has them is not understood.
    if file.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false) {
        return Ok(Err("it joins neighbouring spaces (tokenizer.ggml.remove_extra_whitespaces)".into()));
    }
    if file.metadata.contains_key("tokenizer.ggml.precompiled_charsmap") {
        return Ok(Err("it replaces characters (tokenizer.ggml.precompiled_charsmap)".into()));
    }
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let mut merges = Vec::new();
    for (i, token) in tokens.iter().enumerate().filter(|(i, _)| vocabulary.kinds[*i] == 1) {
        let parts = token.char_indices().skip(1).filter_map(|(at, _)| {
            let (left, right) = token.split_at(at);
            let plain = |part: &str| ids.get(part).copied().filter(|&id| vocabulary.kinds[id] == 1);
            Some((plain(left)?, plain(right)?))
        });
        merges.extend(parts.map(|(left, right)| (i, left, right)));
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    let merges = merges.into_iter().map(|(_, left, right)| json!([tokens[left], tokens[right]])).collect();
    let unknown = (0..tokens.len()).find(|&i| vocabulary.kinds[i] == UNKNOWN).map(|i| tokens[i].as_str());
    let model = bpe(vocabulary, merges, json!({"unk_token": unknown, "fuse_unk": true, "byte_fallback": true}));
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    if prefix {
        before.push(json!({"type": "Prepend", "prepend": SPACE}));
        after.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    before.push(replace(" ", SPACE));
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    decoders.append(&mut after);
    Ok(Ok(Rules {
        normalizer: json!({"type": "Sequence", "normalizers": before}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
        begins: true,
    }))
}
