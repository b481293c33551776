//! Keys of an adapter file <-> names of modules and parameters in the model.

/// What PEFT puts in front of the model's own names.
pub const PREFIX: &str = "base_model.model.";

/// What a tensor of an adapter file is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// `lora_A.weight`, `[r, in]`.
    A,
    /// `lora_B.weight`, `[out, r]`.
    B,
    /// `lora_B.bias`, `[out]`.
    BiasB,
    /// `lora_embedding_A`, `[r, vocabulary]`.
    EmbeddingA,
    /// `lora_embedding_B`, `[dimension, r]`.
    EmbeddingB,
    /// `lora_magnitude_vector`, `[out]` (DoRA).
    Magnitude,
    /// `token_adapter.trainable_tokens_delta`, `[tokens, dimension]`: rows that replace the embedding's.
    TokenRows,
    /// A parameter of the layer below an adapter (`base_layer.weight`, `base_layer.bias`), stored along with it.
    Base,
    /// A parameter that replaces the model's: a saved module, a bias.
    Full,
}

/// Splits a key into the module (or, for [`Part::Base`] and [`Part::Full`], the parameter) and its part. `None` for a key that looks like
/// a LoRA tensor of a kind nobody has told us about.
pub fn parse_key(key: &str) -> Option<(String, Part)> {
    let name = key.strip_prefix(PREFIX).unwrap_or(key);
    for (marker, part, suffix) in [
        (".lora_A", Part::A, ".weight"),
        (".lora_B", Part::B, ".weight"),
        (".lora_B", Part::BiasB, ".bias"),
        (".lora_embedding_A", Part::EmbeddingA, ""),
        (".lora_embedding_B", Part::EmbeddingB, ""),
        (".lora_magnitude_vector", Part::Magnitude, ""),
        (".lora_magnitude_vector", Part::Magnitude, ".weight"),
        (".token_adapter.trainable_tokens_delta", Part::TokenRows, ""),
    ] {
        // A raw state dict has the adapter's name between the two: `lora_A.default.weight`.
        if let Some((module, rest)) = name.rsplit_once(marker)
            && let Some(adapter) = rest.strip_suffix(suffix)
            && (adapter.is_empty() || adapter.starts_with('.') && adapter[1..].split('.').count() == 1)
            && !(suffix.is_empty() && adapter == ".weight")
        {
            return Some((module.to_owned(), part));
        }
    }
    if name.contains(".lora_") || name.contains(".token_adapter.") {
        return None;
    }
    if name.contains(".base_layer.") {
        return Some((name.replace(".base_layer.", "."), Part::Base));
    }
    Some((strip_saved(&name.replace(".original_module.", ".")), Part::Full))
}

/// `score.modules_to_save.default.weight` (raw state dicts) and `score.modules_to_save.weight` -> `score.weight`.
fn strip_saved(name: &str) -> String {
    match name.split_once(".modules_to_save.") {
        Some((module, rest)) => format!("{module}.{}", rest.strip_prefix("default.").unwrap_or(rest)),
        None => name.to_owned(),
    }
}

/// The key PEFT stores a module's A factor under.
pub fn key_a(module: &str) -> String {
    format!("{PREFIX}{module}.lora_A.weight")
}

/// The key PEFT stores a parameter that was trained in full under.
pub fn key_full(parameter: &str) -> String {
    format!("{PREFIX}{parameter}")
}

/// The key PEFT stores a module's B factor under.
pub fn key_b(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_key_is_understood() {
        for (key, module, part) in [
            ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", Part::A),
            ("base_model.model.q.lora_B.default.weight", "q", Part::B),
            ("base_model.model.q.lora_B.bias", "q", Part::BiasB),
            ("base_model.model.wte.lora_embedding_A", "wte", Part::EmbeddingA),
            ("base_model.model.wte.lora_embedding_B.default", "wte", Part::EmbeddingB),
            ("base_model.model.q.lora_magnitude_vector", "q", Part::Magnitude),
            ("base_model.model.q.lora_magnitude_vector.default.weight", "q", Part::Magnitude),
            ("base_model.model.experts.base_layer.lora_A.weight", "experts.base_layer", Part::A),
            ("base_model.model.embed.token_adapter.trainable_tokens_delta", "embed", Part::TokenRows),
            ("base_model.model.embed.base_layer.weight", "embed.weight", Part::Base),
            ("base_model.model.score.modules_to_save.default.weight", "score.weight", Part::Full),
            ("base_model.model.score.modules_to_save.dense.weight", "score.dense.weight", Part::Full),
            ("base_model.model.lm_head.weight", "lm_head.weight", Part::Full),
        ] {
            assert_eq!(parse_key(key), Some((module.to_owned(), part)), "{key}");
        }
        assert_eq!(parse_key("base_model.model.q.lora_E.weight"), None);
    }
}
