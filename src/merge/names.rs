//! Finding an adapter's targets in a base whose names may lack a prefix, or have one more.

use crate::checkpoint::Checkpoint;
use serde_json::Value;

/// How an adapter's names become the base's. Models are saved with and without the prefix of their task head
/// (`model.layers.0...` and `layers.0...`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    Identity,
    Add(String),
    Strip(String),
}

impl Mapping {
    /// The mapping that finds most of `names` (parameters) in `base`; the identity where others do no better.
    pub(super) fn find<'a>(base: &Checkpoint, names: impl Iterator<Item = &'a str> + Clone) -> Mapping {
        let mut candidates = vec![Mapping::Identity];
        for name in names.clone() {
            let tail = format!(".{name}");
            candidates.extend(
                base.tensors().filter_map(|t| Some(Mapping::Add(t.name().strip_suffix(&tail)?.to_owned() + "."))),
            );
            let dots = name.match_indices('.').map(|(i, _)| i + 1).take(2);
            candidates
                .extend(dots.filter(|&i| base.get(&name[i..]).is_some()).map(|i| Mapping::Strip(name[..i].to_owned())));
            if candidates.len() > 1 {
                break;
            }
        }
        let found = |m: &Mapping| names.clone().filter(|n| base.get(&m.apply(n)).is_some()).count();
        // `max_by_key` returns the last of equals, hence the reversal.
        candidates.into_iter().rev().max_by_key(|m| found(m)).unwrap_or(Mapping::Identity)
    }

    /// In words, for a warning.
    pub(super) fn describe(&self) -> String {
        match self {
            Mapping::Identity => "names are the same".to_owned(),
            Mapping::Add(prefix) => format!("'{prefix}' was put in front of its names"),
            Mapping::Strip(prefix) => format!("'{prefix}' was taken off its names"),
        }
    }

    /// The base's name for an adapter's.
    pub(super) fn apply(&self, name: &str) -> String {
        match self {
            Mapping::Identity => name.to_owned(),
            Mapping::Add(prefix) => format!("{prefix}{name}"),
            Mapping::Strip(prefix) => name.strip_prefix(prefix.as_str()).unwrap_or(name).to_owned(),
        }
    }
}

/// An input embedding that is the output head, too: only one of them is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tied {
    /// The stored tensor.
    pub input: String,
    /// What the head would be called.
    pub head: String,
}

impl Tied {
    /// Finds the embedding of a model that stores no head and does not say that it is untied.
    pub(super) fn find(base: &Checkpoint, config: &Value) -> Option<Tied> {
        const INPUTS: [&str; 4] = ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"];
        const HEADS: [&str; 2] = ["lm_head.weight", "embed_out.weight"];
        let says = |config: &Value| config["tie_word_embeddings"].as_bool();
        let untied = says(config).or_else(|| says(&config["text_config"])) == Some(false);
        let ends = |name: &str, end: &str| name == end || name.ends_with(&format!(".{end}"));
        if untied || base.tensors().any(|t| HEADS.iter().any(|head| ends(t.name(), head))) {
            return None;
        }
        let input = base.tensors().find(|t| INPUTS.iter().any(|input| ends(t.name(), input)))?.name().to_owned();
        let head = if ends(&input, "embed_in.weight") { HEADS[1] } else { HEADS[0] };
        Some(Tied { input, head: head.to_owned() })
    }

    /// Whether `name` is the head.
    pub(super) fn is_head(&self, name: &str) -> bool {
        name == self.head || name.ends_with(&format!(".{}", self.head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Dtype, TensorSpec, Writer};
    use std::collections::BTreeMap;

    fn base(names: &[&str]) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let specs: Vec<_> =
            names.iter().map(|n| TensorSpec { name: (*n).into(), dtype: Dtype::U8, shape: vec![0] }).collect();
        Writer::create(dir.path(), &specs, 1, &BTreeMap::new()).unwrap().finish().unwrap();
        let base = Checkpoint::open(dir.path()).unwrap();
        (dir, base)
    }

    #[test]
    fn a_missing_or_extra_prefix_is_found() {
        let names = ["model.layers.0.q.weight", "model.layers.1.q.weight"];
        for (stored, expected) in [
            (["model.layers.0.q.weight", "model.layers.1.q.weight"], Mapping::Identity),
            (["layers.0.q.weight", "layers.1.q.weight"], Mapping::Strip("model.".into())),
            (["vlm.model.layers.0.q.weight", "vlm.model.layers.1.q.weight"], Mapping::Add("vlm.".into())),
            (["other.weight", "more.weight"], Mapping::Identity),
        ] {
            assert_eq!(Mapping::find(&base(&stored).1, names.iter().copied()), expected);
        }
    }
}
