//! What a tensor's name says: which layer it belongs to, and what kind of module it is.

use std::collections::HashMap;

/// Layer and module kind of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleId {
    /// The first number in the name, if there is one.
    pub layer: Option<usize>,
    /// `q_proj`, `embed_tokens`, ...: the module's own name, as in PEFT's `target_modules`.
    pub module: String,
}

/// Layers and kinds of the given tensors. Where two modules of one layer share a name (GPT-2's `c_proj`, the experts of a
/// mixture), their kind is the whole path below the layer, numbers replaced by `*`: `attn.c_proj`, `experts.*.w1`.
pub fn module_ids<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<ModuleId> {
    let mut uses: HashMap<(Option<usize>, &str), usize> = HashMap::new();
    for parts in names.clone().map(split) {
        *uses.entry((parts.layer, parts.short)).or_default() += 1;
    }
    let ambiguous: Vec<&str> = uses.iter().filter(|(_, n)| **n > 1).map(|((_, short), _)| *short).collect();
    names
        .map(|name| {
            let parts = split(name);
            let module = if ambiguous.contains(&parts.short) {
                let path = parts.below.iter().map(|p| if p.parse::<usize>().is_ok() { "*" } else { p });
                path.collect::<Vec<_>>().join(".")
            } else {
                parts.short.to_owned()
            };
            ModuleId { layer: parts.layer, module }
        })
        .collect()
}

struct Parts<'a> {
    layer: Option<usize>,
    /// Components after the layer number, or all of them.
    below: Vec<&'a str>,
    short: &'a str,
}

fn split(name: &str) -> Parts<'_> {
    let components: Vec<&str> = name.strip_suffix(".weight").unwrap_or(name).split('.').collect();
    // A number at the very end (`mlp.0`) is a module's name, not a layer.
    let number = components[..components.len() - 1].iter().position(|c| c.parse::<usize>().is_ok());
    let layer = number.and_then(|i| components[i].parse().ok());
    let below = components[number.map_or(0, |i| i + 1)..].to_vec();
    let short = below.last().copied().unwrap_or(name);
    Parts { layer, below, short }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(names: &[&str]) -> Vec<(Option<usize>, String)> {
        module_ids(names.iter().copied()).into_iter().map(|p| (p.layer, p.module)).collect()
    }

    #[test]
    fn llama_names_give_layer_and_projection() {
        let found = kinds(&["model.layers.11.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]);
        assert_eq!(found, [(Some(11), "q_proj".into()), (None, "lm_head".into()), (None, "embed_tokens".into())]);
    }

    #[test]
    fn namesakes_of_one_layer_are_told_apart() {
        let found = kinds(&["h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "h.0.mlp.c_fc.weight"]);
        assert_eq!(found.iter().map(|k| k.1.as_str()).collect::<Vec<_>>(), ["attn.c_proj", "mlp.c_proj", "c_fc"]);
        let experts = kinds(&["layers.2.moe.experts.0.w1.weight", "layers.2.moe.experts.1.w1.weight"]);
        assert_eq!(experts, vec![(Some(2), "moe.experts.*.w1".into()); 2]);
    }

    #[test]
    fn names_without_structure_are_their_own_kind() {
        assert_eq!(kinds(&["weight", "7", ""]), [(None, "weight".into()), (None, "7".into()), (None, "".into())]);
    }
}
