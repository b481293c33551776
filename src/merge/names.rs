//! Finding an adapter's targets in a base whose names differ: a prefix more or less, names that transformers changed, names
//! that the user maps.

use crate::{
    architecture::{Architecture, Renaming},
    checkpoint::Checkpoint,
    error::{Error, Result},
};

/// How an adapter's names become the base's: the user's rules, then transformers' renaming, then a prefix. Models are saved
/// with and without the prefix of their task head (`model.layers.0...` and `layers.0...`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mapping {
    rules: Vec<(String, String)>,
    renaming: Option<Renaming>,
    prefix: Prefix,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Prefix {
    #[default]
    Same,
    Add(String),
    Strip(String),
}

/// A parameter that an adapter names, and the extents of its update where the adapter alone tells them.
pub(super) type Wanted = (String, Option<(usize, usize)>);

impl Mapping {
    /// The mapping that finds most of `names` in `base`, with the shapes that the adapter gives them; as they are where others
    /// do no better. Two that do equally well, with different targets, are refused: `adapter` is named there. `trained` is the
    /// class that the adapter says it was trained on: that of one tower of a model (`SiglipVisionModel`) decides between towers.
    pub(super) fn find(
        base: &Checkpoint,
        architecture: &Architecture,
        names: &[Wanted],
        rules: &[(String, String)],
        (adapter, trained): (&str, Option<&str>),
    ) -> Result<Mapping> {
        let plain = Mapping { rules: rules.to_vec(), ..Mapping::default() };
        if names.iter().all(|(name, shape)| plain.fit(base, name, *shape) == Some(true)) {
            return Ok(plain);
        }
        let mut candidates = vec![plain];
        if let Some(renaming) = architecture.renaming() {
            for renaming in [renaming.reversed(), renaming] {
                candidates.insert(1, Mapping { rules: rules.to_vec(), renaming: Some(renaming), ..Mapping::default() });
            }
        }
        let mut all = Vec::new();
        for plain in candidates {
            let prefixes = plain.prefixes(base, names);
            all.push(plain.clone());
            all.extend(prefixes.into_iter().map(|prefix| Mapping { prefix, ..plain.clone() }));
        }
        // Where shapes do not fit anywhere, names alone decide, and the shapes are refused later, by name.
        let score = |m: &Mapping| {
            let found = names.iter().map(|(name, shape)| m.fit(base, name, *shape));
            found.fold((0, 0), |(fits, found), fit| {
                (fits + usize::from(fit == Some(true)), found + usize::from(fit.is_some()))
            })
        };
        let best = all.iter().map(score).max().unwrap_or_default();
        let targets = |m: &Mapping| -> Vec<Option<String>> {
            let target = |(name, _): &Wanted| Some(m.apply(name)).filter(|name| base.get(name).is_some());
            names.iter().map(target).collect()
        };
        let mut winners = all.iter().filter(|m| score(m) == best);
        let Some(first) = winners.next() else { return Ok(Mapping::default()) };
        let mine = targets(first);
        // Names that fit as they are have one reading.
        let as_is = first.renaming.is_none() && first.prefix == Prefix::Same;
        let tower =
            ["Vision", "Text", "Audio"].into_iter().find(|tower| trained.is_some_and(|class| class.contains(tower)));
        if let Some(tower) = tower.map(str::to_lowercase)
            && !as_is
        {
            let own = |m: &&Mapping| matches!(&m.prefix, Prefix::Add(prefix) if prefix.contains(&tower));
            let mut of_tower = all.iter().filter(|m| score(m) == best).filter(own);
            if let Some(found) = of_tower.next()
                && of_tower.all(|m| targets(m) == targets(found))
            {
                return Ok(found.clone());
            }
        }
        match winners.find(|m| targets(m) != mine) {
            Some(other) if !as_is && best.1 > 0 => {
                let theirs = targets(other);
                let at = (0..names.len()).find(|&i| mine[i] != theirs[i] && mine[i].is_some() && theirs[i].is_some());
                let show = |t: &[Option<String>]| at.and_then(|i| t[i].clone()).unwrap_or_else(|| "nothing".to_owned());
                let name = at.map_or(names[0].0.as_str(), |i| names[i].0.as_str());
                Err(Error::request(format!(
                    "the names of adapter '{adapter}' fit the base '{}' in two ways: '{name}' can be '{}' or '{}'",
                    base.path().display(),
                    show(&mine),
                    show(&theirs)
                ))
                .help(format!(
                    "say which: --map {}, or --map {}",
                    rule(name, &show(&mine)),
                    rule(name, &show(&theirs))
                )))
            }
            _ => Ok(first.clone()),
        }
    }

    /// Prefixes that would find the first of `names` that any prefix finds.
    fn prefixes(&self, base: &Checkpoint, names: &[Wanted]) -> Vec<Prefix> {
        let mut found = Vec::new();
        for (name, _) in names {
            let name = self.apply(name);
            let tail = format!(".{name}");
            found.extend(
                base.tensors().filter_map(|t| Some(Prefix::Add(t.name().strip_suffix(&tail)?.to_owned() + "."))),
            );
            let dots = name.match_indices('.').map(|(i, _)| i + 1).take(3);
            let strip = dots.filter(|&i| base.get(&name[i..]).is_some());
            found.extend(strip.map(|i| Prefix::Strip(name[..i].to_owned())));
            if !found.is_empty() {
                break;
            }
        }
        found
    }

    /// Whether the base has the tensor, and in the shape that is wanted, read either way.
    fn fit(&self, base: &Checkpoint, name: &str, shape: Option<(usize, usize)>) -> Option<bool> {
        let tensor = base.get(&self.apply(name))?;
        Some(match (shape, tensor.shape()) {
            (Some((m, n)), &[rows, columns]) => (m, n) == (rows, columns) || (n, m) == (rows, columns),
            _ => true,
        })
    }

    /// Whether the base's names are the adapter's.
    pub(super) fn is_identity(&self) -> bool {
        self.renaming.is_none() && self.prefix == Prefix::Same
    }

    /// In words, for a warning.
    pub(super) fn describe(&self) -> String {
        let renamed = self.renaming.as_ref().map(|_| "names that transformers changed were changed back".to_owned());
        let prefix = match &self.prefix {
            Prefix::Same => None,
            Prefix::Add(prefix) => Some(format!("'{prefix}' was put in front of its names")),
            Prefix::Strip(prefix) => Some(format!("'{prefix}' was taken off its names")),
        };
        renamed.into_iter().chain(prefix).collect::<Vec<_>>().join(", and ")
    }

    /// The base's name for an adapter's.
    pub(super) fn apply(&self, name: &str) -> String {
        let ruled = self.rules.iter().find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from.as_str())?)));
        let name = ruled.unwrap_or_else(|| name.to_owned());
        let name = self.renaming.as_ref().map_or(name.clone(), |renaming| renaming.apply(&name));
        match &self.prefix {
            Prefix::Same => name,
            Prefix::Add(prefix) => format!("{prefix}{name}"),
            Prefix::Strip(prefix) => name.strip_prefix(prefix.as_str()).map_or(name.clone(), str::to_owned),
        }
    }
}

/// `FROM=TO` with what both names end in taken off.
fn rule(from: &str, to: &str) -> String {
    let (mut a, mut b): (Vec<&str>, Vec<&str>) = (from.split('.').collect(), to.split('.').collect());
    while a.last() == b.last() && !a.is_empty() {
        a.pop();
        b.pop();
    }
    let dotted = |parts: &[&str]| parts.iter().map(|part| format!("{part}.")).collect::<String>();
    format!("{}={}", dotted(&a), dotted(&b))
}

/// An input embedding that is the output head, too: only one of them is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tied {
    /// The stored tensor.
    pub input: String,
    /// What the head would be called.
    pub head: String,
    /// Whether the head is stored, too.
    pub head_stored: bool,
}

impl Tied {
    /// Finds the embedding of a model whose head is the same matrix: by the architecture, and in a model that stores no head and
    /// does not say that it is untied, by the names that embeddings have.
    pub(super) fn find(base: &Checkpoint, architecture: &Architecture) -> Option<Tied> {
        const INPUTS: [&str; 4] = ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"];
        const HEADS: [&str; 2] = ["lm_head.weight", "embed_out.weight"];
        let ends = |name: &str, end: &str| crate::architecture::is_end(name, end);
        if architecture.says_untied() {
            return None;
        }
        let renaming = architecture.renaming();
        for (head, input) in architecture.tied() {
            let stored = |name: &str| renaming.as_ref().map_or(name.to_owned(), |r| r.apply(name));
            let (head, input) = (stored(head), stored(input));
            // The base may lack the prefix of its task: `wte.weight` for `transformer.wte.weight`.
            let without = input.split_once('.').map_or("", |(_, rest)| rest);
            let Some(found) = [input.as_str(), without].into_iter().find(|name| base.get(name).is_some()) else {
                continue;
            };
            let is_output = architecture.kind(&head) != Some(crate::architecture::LayerKind::Embedding);
            let head_stored = base.get(&head).is_some();
            if is_output && (!head_stored || architecture.ties() == Some(true)) {
                return Some(Tied { input: found.to_owned(), head, head_stored });
            }
        }
        let head = base.tensors().find(|t| HEADS.iter().any(|head| ends(t.name(), head)));
        if head.is_some() && architecture.ties() != Some(true) {
            return None;
        }
        let input = base.tensors().find(|t| INPUTS.iter().any(|input| ends(t.name(), input)))?.name().to_owned();
        let other = if ends(&input, "embed_in.weight") { HEADS[1] } else { HEADS[0] };
        let name = head.map_or(other, |t| t.name()).to_owned();
        Some(Tied { input, head: name, head_stored: head.is_some() })
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
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    fn base(names: &[&str]) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let specs: Vec<_> =
            names.iter().map(|n| TensorSpec { name: (*n).into(), dtype: Dtype::U8, shape: vec![0] }).collect();
        Writer::create(dir.path(), &specs, 1, &BTreeMap::new()).unwrap().finish().unwrap();
        let base = Checkpoint::open(dir.path()).unwrap();
        (dir, base)
    }

    fn find(stored: &[&str], names: &[&str], class: &str, rules: &[(String, String)]) -> Result<Vec<String>> {
        let config = json!({"architectures": [class]});
        let wanted: Vec<Wanted> = names.iter().map(|n| ((*n).to_owned(), None)).collect();
        let mapping = Mapping::find(&base(stored).1, &Architecture::of(&config), &wanted, rules, ("lora", None))?;
        Ok(names.iter().map(|n| mapping.apply(n)).collect())
    }

    #[test]
    fn a_missing_or_extra_prefix_is_found() {
        let names = ["model.layers.0.q.weight", "model.layers.1.q.weight"];
        for stored in [
            ["model.layers.0.q.weight", "model.layers.1.q.weight"],
            ["layers.0.q.weight", "layers.1.q.weight"],
            ["vlm.model.layers.0.q.weight", "vlm.model.layers.1.q.weight"],
        ] {
            assert_eq!(find(&stored, &names, "Unknown", &[]).unwrap(), stored);
        }
        assert_eq!(find(&["other.weight", "more.weight"], &names, "Unknown", &[]).unwrap(), names);
    }

    #[test]
    fn names_that_fit_two_prefixes_are_refused_until_a_rule_decides() {
        let stored = ["text.layers.0.q.weight", "vision.layers.0.q.weight"];
        let error = find(&stored, &["layers.0.q.weight"], "Unknown", &[]).unwrap_err();
        assert!(error.message.contains("'layers.0.q.weight' can be 'text.layers.0.q.weight' or 'vision"), "{error}");
        assert!(error.help.unwrap().contains("--map =vision."));
        let rule = [(String::new(), "vision.".to_owned())];
        assert_eq!(find(&stored, &["layers.0.q.weight"], "Unknown", &rule).unwrap(), ["vision.layers.0.q.weight"]);
        // The one with more matches has no rival, and names that fit as they are have none either.
        let more = ["text.layers.0.q.weight", "vision.layers.0.q.weight", "vision.layers.1.q.weight"];
        let names = ["layers.0.q.weight", "layers.1.q.weight"];
        assert_eq!(find(&more, &names, "Unknown", &[]).unwrap()[0], "vision.layers.0.q.weight");
        let own = ["layers.0.q.weight", "vision.layers.0.q.weight"];
        assert_eq!(find(&own, &["layers.0.q.weight"], "Unknown", &[]).unwrap(), ["layers.0.q.weight"]);
    }

    #[test]
    fn the_class_that_was_trained_decides_between_towers() {
        let stored = ["text_model.layers.0.q.weight", "vision_model.layers.0.q.weight"];
        let wanted = [("layers.0.q.weight".to_owned(), None)];
        let find = |class| {
            let found =
                Mapping::find(&base(&stored).1, &Architecture::of(&Value::Null), &wanted, &[], ("lora", class))?;
            Ok::<_, Error>(found.apply("layers.0.q.weight"))
        };
        assert_eq!(find(Some("SiglipVisionModel")).unwrap(), stored[1]);
        assert_eq!(find(Some("SiglipTextModel")).unwrap(), stored[0]);
        assert!(find(Some("SiglipModel")).is_err() && find(None).is_err());
    }

    #[test]
    fn names_that_transformers_changed_are_found_in_both_directions() {
        let (old, new) =
            ("model.layers.0.self_attn.q_proj.weight", "model.language_model.layers.0.self_attn.q_proj.weight");
        let class = "Qwen2VLForConditionalGeneration";
        assert_eq!(find(&[old], &[new], class, &[]).unwrap(), [old]);
        assert_eq!(find(&[new], &[old], class, &[]).unwrap(), [new]);
        let (old, new) =
            ("vit.encoder.layer.3.attention.attention.query.weight", "vit.layers.3.attention.q_proj.weight");
        assert_eq!(find(&[old], &[new], "ViTForImageClassification", &[]).unwrap(), [old]);
        let (old, new) = ("language_model.model.layers.0.q.weight", "model.language_model.layers.0.q.weight");
        assert_eq!(find(&[old], &[new], "LlavaForConditionalGeneration", &[]).unwrap(), [old]);
    }

    #[test]
    fn tied_weights_are_found_by_class_and_by_what_is_stored() {
        let tied = |names: &[&str], config: Value| {
            Tied::find(&base(names).1, &Architecture::of(&config)).map(|t| (t.input, t.head, t.head_stored))
        };
        let pair = |a: &str, b: &str, stored| Some((a.to_owned(), b.to_owned(), stored));
        let t5 = json!({"architectures": ["T5ForConditionalGeneration"]});
        assert_eq!(tied(&["shared.weight"], t5), pair("shared.weight", "lm_head.weight", false));
        let both = ["model.embed_tokens.weight", "lm_head.weight"];
        let llama = |tie: bool| json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tie});
        assert_eq!(tied(&both, llama(true)), pair(both[0], both[1], true));
        assert_eq!(tied(&both, llama(false)), None);
        assert_eq!(tied(&both, Value::Null), None);
        assert_eq!(tied(&both[..1], Value::Null), pair(both[0], both[1], false));
        assert_eq!(tied(&["wte.weight"], json!({"model_type": "gpt2"})), pair("wte.weight", "lm_head.weight", false));
    }
}
