//! Finding an adapter's targets in a base whose names may lack a prefix, or have one more.

use crate::checkpoint::Checkpoint;

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

    /// The base's name for an adapter's.
    pub(super) fn apply(&self, name: &str) -> String {
        match self {
            Mapping::Identity => name.to_owned(),
            Mapping::Add(prefix) => format!("{prefix}{name}"),
            Mapping::Strip(prefix) => name.strip_prefix(prefix.as_str()).unwrap_or(name).to_owned(),
        }
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
