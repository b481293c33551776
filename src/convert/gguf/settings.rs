//! Every metadata key of a GGUF file is carried over, checked, refused or reported: none is passed over in silence.
//!
//! Keys: `gguf/constants.py` of the package `gguf` 0.19. What they mean for a LLaMA-like model: llama.cpp's
//! `src/llama-model.cpp` and `conversion/`; the value that changes nothing is the one llama.cpp assumes without the key.

use super::reader::{Gguf, Value};
use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// Keys below the architecture's name that `llama.rs` and `rope.rs` read.
const CARRIED: [&str; 20] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
];

/// Keys that describe the model and change nothing in it.
const DESCRIPTIVE: [&str; 2] = ["vocab_size", "rope.scaling.finetuned"];

/// What a key must be, since the models of these architectures in transformers have no such setting.
#[derive(Clone, Copy, Debug)]
enum Neutral {
    Number(f64),
    /// Either number.
    Numbers(f64, f64),
    Flag(bool),
    Text(&'static str),
}

use Neutral::{Flag, Number, Numbers, Text};

/// Keys that change the arithmetic, with the values that do not.
const NEUTRAL: [(&str, Neutral); 26] = [
    ("attention.causal", Flag(true)),
    ("attention.clamp_kqv", Number(0.0)),
    ("attention.max_alibi_bias", Number(0.0)),
    ("attention.output_scale", Numbers(0.0, 1.0)),
    ("attention.shared_kv_layers", Number(0.0)),
    ("attention.temperature_length", Number(0.0)),
    ("attention.temperature_scale", Number(0.0)),
    ("attn_logit_softcapping", Number(0.0)),
    ("embedding_scale", Numbers(0.0, 1.0)),
    ("expert_group_count", Number(0.0)),
    ("expert_group_used_count", Number(0.0)),
    ("expert_shared_count", Number(0.0)),
    ("expert_used_count", Number(0.0)),
    ("final_logit_softcapping", Number(0.0)),
    ("leading_dense_block_count", Number(0.0)),
    ("logit_scale", Numbers(0.0, 1.0)),
    ("nextn_predict_layers", Number(0.0)),
    ("pooling_type", Number(0.0)),
    ("residual_scale", Numbers(0.0, 1.0)),
    ("rope.scaling.alpha", Numbers(0.0, 1.0)),
    ("rope.scaling.attn_factor", Number(1.0)),
    ("rope.scaling.yarn_log_multiplier", Number(0.0)),
    ("router_logit_softcapping", Number(0.0)),
    ("swin_norm", Flag(false)),
    // Rotary pairs side by side, as this architecture always has them.
    ("tensor_data_layout", Text("Meta AI original pth")),
    ("use_parallel_residual", Flag(false)),
];

/// Keys of the vocabulary that `tokenizer.rs` and `sentencepiece.rs` read.
const VOCABULARY: [&str; 17] = [
    "chat_template",
    "ggml.add_bos_token",
    "ggml.add_eos_token",
    "ggml.add_space_prefix",
    "ggml.bos_token_id",
    "ggml.eos_token_id",
    "ggml.eot_token_id",
    "ggml.merges",
    "ggml.model",
    "ggml.padding_token_id",
    "ggml.pre",
    "ggml.precompiled_charsmap",
    "ggml.remove_extra_whitespaces",
    "ggml.scores",
    "ggml.token_type",
    "ggml.tokens",
    "ggml.unknown_token_id",
];

/// `general.sampling.*` -> `generation_config.json`.
pub const SAMPLING: [(&str, &str); 5] = [
    ("temp", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("penalty_repeat", "repetition_penalty"),
];

/// Refuses what would change the arithmetic and cannot be carried over, unless `waived` names it. Returns a sentence for
/// each group of keys that the output lacks.
pub fn check(file: &Gguf, architecture: &str, head_dim: usize, waived: &[String]) -> Result<Vec<String>> {
    if let Some(kind) = file.text("general.type")?.filter(|&kind| kind != "model") {
        return Err(file.bad(format!("general.type is '{kind}', expected 'model'")).help(match kind {
            "adapter" => "name the adapter in its PEFT format to `merge`; adapters in GGUF are not read",
            _ => "name the file of the language model itself",
        }));
    }
    let mut waived_here = BTreeSet::new();
    let mut others = BTreeSet::new();
    for (key, value) in &file.metadata {
        if waived.iter().any(|name| name == key) {
            waived_here.insert(key.as_str());
            continue;
        }
        if let Some(name) = key.strip_prefix(architecture).and_then(|rest| rest.strip_prefix('.')) {
            check_setting(file, key, name, value, head_dim)?;
        } else if let Some(name) = key.strip_prefix("tokenizer.") {
            if !VOCABULARY.contains(&name) {
                others.insert(key.as_str());
            }
        } else if let Some(name) = key.strip_prefix("general.sampling.") {
            if !SAMPLING.iter().any(|(from, _)| *from == name) {
                others.insert(key.as_str());
            }
        } else if !["general.", "split.", "quantize."].iter().any(|start| key.starts_with(start)) {
            others.insert(key.as_str());
        }
    }
    if let Some(missing) = waived.iter().find(|name| !file.metadata.contains_key(name.as_str())) {
        return Err(file.bad(format!("it has no metadata key '{missing}' to leave out")).help("check --leave-out"));
    }
    let list = |keys: BTreeSet<&str>| keys.into_iter().collect::<Vec<_>>().join(", ");
    let mut sentences = Vec::new();
    if !waived_here.is_empty() {
        sentences.push(format!("settings that --leave-out names are not carried over: {}", list(waived_here)));
    }
    if !others.is_empty() {
        sentences.push(format!("metadata without a place in the output: {}", list(others)));
    }
    Ok(sentences)
}

fn check_setting(file: &Gguf, key: &str, name: &str, value: &Value, head_dim: usize) -> Result<()> {
    if CARRIED.contains(&name) || DESCRIPTIVE.contains(&name) {
        return Ok(());
    }
    let number = match *value {
        Value::Int(n) => Some(n as f64),
        Value::Float(x) => Some(x),
        _ => None,
    };
    let is = |expected: f64| number.is_some_and(|x| (x - expected).abs() <= 1e-6 * expected.abs());
    let (fits, expected) = match name {
        // 1/sqrt(D) is what everyone computes without the key.
        "attention.scale" => {
            let usual = 1.0 / (head_dim as f64).sqrt();
            (is(usual) || is(0.0), format!("{usual:.6}"))
        }
        // A window as long as the context hides nothing.
        "attention.sliding_window" => {
            let context = file.count(&key.replace("attention.sliding_window", "context_length"))?.unwrap_or(0) as f64;
            (is(0.0) || number.is_some_and(|x| x >= context), format!("0, or at least the context of {context}"))
        }
        _ => match NEUTRAL.iter().find(|(known, _)| *known == name) {
            None => return Err(refused(file, key, value, "it is not known here")),
            Some((_, Number(n))) => (is(*n), n.to_string()),
            Some((_, Numbers(a, b))) => (is(*a) || is(*b), format!("{a} or {b}")),
            Some((_, Flag(flag))) => (*value == Value::Bool(*flag), flag.to_string()),
            Some((_, Text(text))) => (*value == Value::Text((*text).into()), format!("'{text}'")),
        },
    };
    if fits { Ok(()) } else { Err(refused(file, key, value, &format!("expected {expected}"))) }
}

fn refused(file: &Gguf, key: &str, value: &Value, why: &str) -> Error {
    file.bad(format!("the setting {key} is {}, which config.json cannot express: {why}", shown(value))).help(format!(
        "the output would compute something else than the file; to convert it all the same: --leave-out {key}"
    ))
}

/// A value, cut to a readable length.
pub fn shown(value: &Value) -> String {
    let mut text = match value {
        Value::Int(n) => n.to_string(),
        Value::Float(x) => x.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Text(text) => format!("'{text}'"),
        other => format!("{other:?}"),
    };
    if let Some((cut, _)) = text.char_indices().nth(60) {
        text.replace_range(cut.., "...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn fixture() -> Gguf {
        Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf/types.gguf")).unwrap()
    }

    fn with(key: &str, value: Value) -> Result<Vec<String>> {
        let mut file = fixture();
        file.metadata.insert(key.into(), value);
        check(&file, "llama", 16, &[])
    }

    #[test]
    fn the_keys_of_the_fixture_have_their_places() {
        assert_eq!(check(&fixture(), "llama", 16, &[]).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn settings_that_change_the_arithmetic_are_refused_by_name() {
        for (name, value) in [
            ("attention.causal", Value::Bool(false)),
            ("attention.scale", Value::Float(0.1)),
            ("attention.sliding_window", Value::Int(16)),
            ("attn_logit_softcapping", Value::Float(50.0)),
            ("final_logit_softcapping", Value::Float(30.0)),
            ("logit_scale", Value::Float(0.0625)),
            ("embedding_scale", Value::Float(12.0)),
            ("residual_scale", Value::Float(0.22)),
            ("use_parallel_residual", Value::Bool(true)),
            ("attention.clamp_kqv", Value::Float(8.0)),
            ("attention.max_alibi_bias", Value::Float(8.0)),
            ("rope.scaling.attn_factor", Value::Float(1.19)),
            ("rope.scaling.yarn_log_multiplier", Value::Float(0.0707)),
            ("pooling_type", Value::Int(3)),
            ("tensor_data_layout", Value::Text("other".into())),
            ("a_setting_of_tomorrow", Value::Int(1)),
        ] {
            let error = with(&format!("llama.{name}"), value).unwrap_err();
            let help = error.help.unwrap();
            assert!(error.message.contains(&format!("llama.{name} is ")), "{}", error.message);
            assert!(help.contains(&format!("--leave-out llama.{name}")), "{help}");
        }
    }

    #[test]
    fn values_that_change_nothing_pass() {
        for (name, value) in [
            ("attention.causal", Value::Bool(true)),
            ("attention.scale", Value::Float(0.25)),
            ("attention.sliding_window", Value::Int(1 << 20)),
            ("attn_logit_softcapping", Value::Float(0.0)),
            ("logit_scale", Value::Float(1.0)),
            ("rope.scaling.finetuned", Value::Bool(true)),
            ("rope.scaling.attn_factor", Value::Float(1.0)),
            ("tensor_data_layout", Value::Text("Meta AI original pth".into())),
            ("vocab_size", Value::Int(32)),
        ] {
            assert!(with(&format!("llama.{name}"), value).unwrap().is_empty(), "{name}");
        }
    }

    #[test]
    fn what_has_no_place_is_reported_and_what_is_waived_too() {
        let sentences = with("tokenizer.ggml.fim_pre_token_id", Value::Int(3)).unwrap();
        assert_eq!(sentences, ["metadata without a place in the output: tokenizer.ggml.fim_pre_token_id"]);
        assert!(with("general.name", Value::Text("x".into())).unwrap().is_empty());
        let error = with("general.type", Value::Text("adapter".into())).unwrap_err();
        assert!(error.message.contains("general.type is 'adapter'"), "{error}");
        let mut file = fixture();
        file.metadata.insert("llama.logit_scale".into(), Value::Float(0.5));
        let waived = ["llama.logit_scale".to_owned()];
        let sentences = check(&file, "llama", 16, &waived).unwrap();
        assert_eq!(sentences, ["settings that --leave-out names are not carried over: llama.logit_scale"]);
        let error = check(&fixture(), "llama", 16, &waived).unwrap_err();
        assert!(error.message.contains("no metadata key 'llama.logit_scale'"), "{error}");
    }
}
