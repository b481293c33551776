//! Keys of an adapter file <-> names of modules and parameters in the model.

use super::{Stored, types::AdapterType};

/// What PEFT puts in front of the model's own names.
pub const PREFIX: &str = "base_model.model.";

/// What PEFT puts in front of tensors that all modules share.
const SHARED_PREFIX: &str = "base_model.";

/// Whose tensor a key names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// One of the tensors that make the update of `module`, or of all modules if that is empty.
    Slot {
        /// Name inside the model.
        module: String,
        /// One of the type's [slots](AdapterType::slots).
        slot: String,
    },
    /// A tensor that belongs to no update.
    Stored {
        /// The parameter, or for rows the module.
        name: String,
        /// How it is stored.
        stored: Stored,
    },
}

/// Where PEFT keeps the untrained copy of a module that it trains in full.
pub const ORIGINAL: &str = ".original_module.";

/// Segments that torch.compile, FSDP and activation checkpointing put into names; no model has them.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// The name that training gave the adapter, where keys carry one as in raw state dicts: `lora_A.NAME.weight`.
pub fn adapter_name<'k>(keys: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    keys.filter_map(|key| key.rsplit_once(".lora_A.")?.1.strip_suffix(".weight")).find(|name| !name.contains('.'))
}

/// A key as `save_pretrained` writes it: without the segments of wrappers, DDP's `module.` and the adapter's name in
/// `modules_to_save.NAME.`.
pub fn plain_key(key: &str, adapter: Option<&str>) -> String {
    let unwrapped: Vec<&str> = key.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let mut key = unwrapped.join(".");
    while let Some(rest) = key.strip_prefix("module.").filter(|rest| rest.contains("base_model.model.")) {
        key = rest.to_owned();
    }
    match adapter {
        Some(name) => key.replace(&format!(".modules_to_save.{name}."), ".modules_to_save."),
        None => key,
    }
}

/// Takes a key of an adapter of type `kind` apart. `None` for a key that looks like one of the type's tensors but is none.
pub fn parse_key(key: &str, kind: &dyn AdapterType) -> Option<Key> {
    let name = match (key.strip_prefix(PREFIX), key.strip_prefix(SHARED_PREFIX)) {
        (Some(name), _) => name.to_owned(),
        // A dot, because no module stands before the slot.
        (None, Some(shared)) if find_slot(&format!(".{shared}"), kind).is_some() => format!(".{shared}"),
        _ => key.to_owned(),
    };
    if let Some((module, slot)) = find_slot(&name, kind) {
        return Some(Key::Slot { module: module.to_owned(), slot });
    }
    for rows in [".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta"] {
        if let Some((module, rest)) = name.rsplit_once(rows)
            && is_adapter_name(rest)
        {
            return Some(Key::Stored { name: module.to_owned(), stored: Stored::TokenRows });
        }
    }
    // What `save_embedding_layers` writes along with rows.
    if let Some((module, rest)) = name.split_once(".token_adapter.base_layer.") {
        return Some(Key::Stored { name: format!("{module}.{rest}"), stored: Stored::Base });
    }
    if let Some(marker) = kind.replaces()
        && name.contains(marker)
    {
        return Some(Key::Stored { name: name.replace(marker, "."), stored: Stored::Full });
    }
    if name.contains(&format!(".{}", kind.prefix())) || name.contains(".token_adapter.") {
        return None;
    }
    if name.contains(".base_layer.") {
        return Some(Key::Stored { name: name.replace(".base_layer.", "."), stored: Stored::Base });
    }
    if name.contains(ORIGINAL) {
        return Some(Key::Stored { name: name.replace(ORIGINAL, "."), stored: Stored::Base });
    }
    Some(Key::Stored { name: strip_saved(&name), stored: Stored::Full })
}

/// The module and the slot of a name that ends in one of the type's slots: `q_proj.hada_w1_a`, also with `.weight`, and in
/// raw state dicts with the adapter's name (`lora_A.default.weight`).
fn find_slot<'n>(name: &'n str, kind: &dyn AdapterType) -> Option<(&'n str, String)> {
    kind.slots().iter().find_map(|slot| {
        let (first, rest) = slot.split_once('.').map_or((*slot, ""), |(first, rest)| (first, rest));
        let (module, tail) = name.rsplit_once(&format!(".{first}"))?;
        let tail = tail.strip_suffix(".weight").unwrap_or(tail);
        let plain = |tail: &str| match rest {
            "" => tail.is_empty().then(|| (*slot).to_owned()),
            // A number, or a name that the file chooses.
            "#" => tail.strip_prefix('.').filter(|n| n.parse::<usize>().is_ok()).map(|n| format!("{first}.{n}")),
            "*" => tail.strip_prefix('.').filter(|n| !n.is_empty() && !n.contains('.')).map(|n| format!("{first}.{n}")),
            rest => (tail.strip_prefix('.') == Some(rest)).then(|| (*slot).to_owned()),
        };
        let without_adapter = || {
            let (name, after) = tail.strip_prefix('.')?.split_once('.').unwrap_or((tail.strip_prefix('.')?, ""));
            let after = if after.is_empty() { String::new() } else { format!(".{after}") };
            let is_name = !name.is_empty() && name != "weight" && name != "bias";
            is_name.then(|| plain(&after)).flatten()
        };
        Some((module, plain(tail).or_else(without_adapter)?))
    })
}

/// Nothing, or a dot and one component.
fn is_adapter_name(rest: &str) -> bool {
    rest.is_empty() || rest.strip_prefix('.').is_some_and(|name| !name.is_empty() && !name.contains('.'))
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
    use super::{super::types::lora::Lora, *};

    #[test]
    fn every_kind_of_key_is_understood() {
        for (key, owner, slot) in [
            ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", "lora_A"),
            ("base_model.model.q.lora_B.default.weight", "q", "lora_B"),
            ("base_model.model.q.lora_B.bias", "q", "lora_B.bias"),
            ("base_model.model.q.lora_B.default.bias", "q", "lora_B.bias"),
            ("base_model.model.wte.lora_embedding_A", "wte", "lora_embedding_A"),
            ("base_model.model.wte.lora_embedding_B.default", "wte", "lora_embedding_B"),
            ("base_model.model.q.lora_magnitude_vector", "q", "lora_magnitude_vector"),
            ("base_model.model.q.lora_magnitude_vector.default.weight", "q", "lora_magnitude_vector"),
            ("base_model.model.experts.base_layer.lora_A.weight", "experts.base_layer", "lora_A"),
        ] {
            let expected = Key::Slot { module: owner.to_owned(), slot: slot.to_owned() };
            assert_eq!(parse_key(key, &Lora), Some(expected), "{key}");
        }
        for (key, owner, stored) in [
            ("base_model.model.embed.token_adapter.trainable_tokens_delta", "embed", Stored::TokenRows),
            ("base_model.model.embed.base_layer.weight", "embed.weight", Stored::Base),
            ("base_model.model.score.modules_to_save.default.weight", "score.weight", Stored::Full),
            ("base_model.model.score.modules_to_save.dense.weight", "score.dense.weight", Stored::Full),
            ("base_model.model.lm_head.weight", "lm_head.weight", Stored::Full),
            ("base_model.model.embed.token_adapter.base_layer.weight", "embed.weight", Stored::Base),
            ("base_model.model.lm_head.original_module.weight", "lm_head.weight", Stored::Base),
        ] {
            let expected = Key::Stored { name: owner.to_owned(), stored };
            assert_eq!(parse_key(key, &Lora), Some(expected), "{key}");
        }
        assert_eq!(parse_key("base_model.model.q.lora_E.weight", &Lora), None);
        assert_eq!(parse_key("base_model.model.q.lora_A.bias.weight.x", &Lora), None);
    }

    #[test]
    fn wrappers_and_the_name_of_the_adapter_are_taken_off() {
        let keys = ["base_model.model.q.lora_B.stage.weight", "base_model.model.q.lora_A.stage.weight"];
        assert_eq!(adapter_name(keys.into_iter()), Some("stage"));
        assert_eq!(adapter_name(["base_model.model.q.lora_A.weight"].into_iter()), None);
        for (key, plain) in [
            ("_orig_mod.base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
            ("module.base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
            ("module._orig_mod.base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
            ("base_model.model.l.0._fsdp_wrapped_module.q.lora_A.weight", "base_model.model.l.0.q.lora_A.weight"),
            ("base_model.model.l.0._checkpoint_wrapped_module.q.lora_A.weight", "base_model.model.l.0.q.lora_A.weight"),
            ("base_model.model.head.modules_to_save.stage.weight", "base_model.model.head.modules_to_save.weight"),
            (
                "base_model.model.head.modules_to_save.dense.weight",
                "base_model.model.head.modules_to_save.dense.weight",
            ),
            ("base_model.model.a.module.q.lora_A.weight", "base_model.model.a.module.q.lora_A.weight"),
        ] {
            assert_eq!(plain_key(key, Some("stage")), plain, "{key}");
        }
    }
}
