//! What an architecture's own code says about its weights: kinds of layers, tied weights, names that changed, fused experts.
//!
//! The facts are data, `table.json`, written by `tools/architecture_table.py` from the classes of transformers; its first line
//! names the versions. An architecture that the table lacks has no facts here: what its tensors prove decides then.

mod renaming;

pub use renaming::Renaming;

use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, sync::LazyLock};

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    // A test reads it: it is part of the program, not an input.
    serde_json::from_str(include_str!("table.json")).unwrap_or(Table { entries: Vec::new() })
});

#[derive(Deserialize)]
struct Table {
    entries: Vec<Entry>,
}

/// The facts that some classes share. Names are as stored, numbers in them are written `#`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    /// Class -> `model_type`.
    classes: BTreeMap<String, String>,
    /// Ends of names of modules.
    conv1d: Vec<String>,
    embedding: Vec<String>,
    other: Vec<String>,
    /// Tensor -> the tensor it is.
    tied: BTreeMap<String, String>,
    /// Whether the configuration ties by default.
    tie: bool,
    /// Beginnings of names, in memory -> as stored.
    renamed: BTreeMap<String, String>,
    /// Parameters in memory -> what they are stored as, one by one.
    split: BTreeMap<String, Vec<String>>,
    experts_in_out: bool,
}

/// What the weight of a module is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// `y = x Wᵀ`, stored `[out, in]`.
    Linear,
    /// `y = x W`, stored `[in, out]`.
    Conv1d,
    /// `[vocabulary, dimension]`.
    Embedding,
    /// A layer that adapters do not know: a router, say.
    Other,
}

/// The facts about one model.
#[derive(Clone, Debug)]
pub struct Architecture {
    entry: Option<&'static Entry>,
    model_type: Option<String>,
    says_tied: Option<bool>,
}

impl Architecture {
    /// Of the model with this `config.json` (null where there is none).
    pub fn of(config: &Value) -> Architecture {
        let class = config["architectures"][0].as_str();
        let model_type = config["model_type"].as_str();
        let by_class = class.and_then(|class| TABLE.entries.iter().find(|e| e.classes.contains_key(class)));
        let by_type = || {
            let own = |e: &&Entry| e.classes.values().any(|t| Some(t.as_str()) == model_type);
            let causal = |e: &&Entry| {
                e.classes.iter().any(|(c, t)| Some(t.as_str()) == model_type && c.ends_with("ForCausalLM"))
            };
            TABLE.entries.iter().find(causal).or_else(|| TABLE.entries.iter().find(own))
        };
        let says = |config: &Value| config["tie_word_embeddings"].as_bool();
        let nested = ["text_config", "llm_config", "decoder"].iter().find_map(|key| says(&config[*key]));
        Architecture {
            entry: by_class.or_else(by_type),
            model_type: model_type.map(str::to_owned),
            says_tied: says(config).or(nested),
        }
    }

    /// `model_type` of config.json.
    pub fn model_type(&self) -> Option<&str> {
        self.model_type.as_deref()
    }

    /// Whether the table has a class of this name.
    pub fn is_class(name: &str) -> bool {
        TABLE.entries.iter().any(|e| e.classes.contains_key(name))
    }

    /// The kind of the layer whose weight is stored as `tensor`; `None` for an architecture that is not in the table.
    pub fn kind(&self, tensor: &str) -> Option<LayerKind> {
        let entry = self.entry?;
        let module = renaming::mask(tensor.strip_suffix(".weight").unwrap_or(tensor)).0;
        let is = |ends: &[String]| ends.iter().any(|end| is_end(&module, end));
        Some(match () {
            () if is(&entry.conv1d) => LayerKind::Conv1d,
            () if is(&entry.embedding) => LayerKind::Embedding,
            () if is(&entry.other) => LayerKind::Other,
            () => LayerKind::Linear,
        })
    }

    /// Whether the input embedding and the head are one matrix: what the configuration says, else the class's default. `None`
    /// where neither says anything.
    pub fn ties(&self) -> Option<bool> {
        self.says_tied.or_else(|| self.entry.map(|e| e.tie))
    }

    /// Whether the configuration itself says that they are not.
    pub fn says_untied(&self) -> bool {
        self.says_tied == Some(false)
    }

    /// Pairs of tensors that are one where weights are tied: the one that need not be stored, and the one it is.
    pub fn tied(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.entry.into_iter().flat_map(|e| e.tied.iter().map(|(a, b)| (a.as_str(), b.as_str())))
    }

    /// The names that transformers changed, if it changed some: in memory -> as stored.
    pub fn renaming(&self) -> Option<Renaming> {
        self.entry.filter(|e| !e.renamed.is_empty()).map(|e| Renaming::new(&e.renamed))
    }

    /// What the parameter `name` (in memory) is stored as, where that is more than one tensor: names with `#` for the numbers
    /// of layers and experts.
    pub fn split(&self, name: &str) -> Option<&'static [String]> {
        let masked = renaming::mask(name).0;
        self.entry?.split.get(&masked).map(Vec::as_slice)
    }

    /// Whether expert parameters are `[experts, in, out]`, which matters where both extents are the same.
    pub fn experts_in_out(&self) -> bool {
        self.entry.is_some_and(|e| e.experts_in_out)
    }
}

/// Whether `name` is `end`, or ends in a dot and `end`.
pub fn is_end(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(class: &str) -> Architecture {
        let found = Architecture::of(&json!({"architectures": [class]}));
        assert!(found.entry.is_some(), "{class}");
        found
    }

    #[test]
    fn kinds_of_layers_are_those_of_the_classes() {
        for (class, tensor, kind) in [
            ("GPT2LMHeadModel", "transformer.h.0.attn.c_proj.weight", LayerKind::Conv1d),
            ("GPT2ForSequenceClassification", "score.weight", LayerKind::Linear),
            ("GPT2LMHeadModel", "transformer.wpe.weight", LayerKind::Embedding),
            ("OpenAIGPTLMHeadModel", "transformer.h.11.mlp.c_fc.weight", LayerKind::Conv1d),
            (
                "T5ForConditionalGeneration",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                LayerKind::Embedding,
            ),
            ("CLIPModel", "text_model.embeddings.token_embedding.weight", LayerKind::Embedding),
            ("LlamaForCausalLM", "model.layers.0.mlp.down_proj.weight", LayerKind::Linear),
        ] {
            assert_eq!(of(class).kind(tensor), Some(kind), "{class} {tensor}");
        }
        assert_eq!(Architecture::of(&Value::Null).kind("q.weight"), None);
    }

    #[test]
    fn ties_come_from_the_configuration_first_then_from_the_class() {
        let ties = |config| Architecture::of(&config).ties();
        assert_eq!(ties(json!({"architectures": ["LlamaForCausalLM"]})), Some(false));
        assert_eq!(ties(json!({"architectures": ["Gemma2ForCausalLM"]})), Some(true));
        assert_eq!(ties(json!({"model_type": "gpt2"})), Some(true));
        assert_eq!(ties(json!({"model_type": "gpt2", "tie_word_embeddings": false})), Some(false));
        assert_eq!(ties(json!({"text_config": {"tie_word_embeddings": true}})), Some(true));
        assert_eq!(ties(json!({})), None);
        assert!(of("GPT2LMHeadModel").tied().any(|pair| pair == ("lm_head.weight", "transformer.wte.weight")));
    }

    #[test]
    fn fused_experts_are_known_with_what_they_are_stored_as() {
        let stored = of("MixtralForCausalLM").split("model.layers.3.mlp.experts.gate_up_proj").unwrap();
        assert_eq!(stored.len(), 2);
        assert!(stored[0].ends_with("block_sparse_moe.experts.*.w1.weight"), "{stored:?}");
        assert!(of("GptOssForCausalLM").experts_in_out() && !of("MixtralForCausalLM").experts_in_out());
    }
}
