//! Names of a model in memory <-> names as stored, by the longest beginning that a table lists.

use std::collections::BTreeMap;

/// Rules `beginning -> beginning`, both with `#` for numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renaming(BTreeMap<String, String>);

impl Renaming {
    pub(super) fn new(rules: &BTreeMap<String, String>) -> Renaming {
        Renaming(rules.clone())
    }

    /// The other direction. Where two names in memory are stored under one, there is none for these.
    pub fn reversed(&self) -> Renaming {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        self.0.values().for_each(|to| *counts.entry(to).or_default() += 1);
        let single = self.0.iter().filter(|(_, to)| counts[to.as_str()] == 1);
        Renaming(single.map(|(from, to)| (to.clone(), from.clone())).collect())
    }

    /// The other name. Names that no rule covers stay.
    pub fn apply(&self, name: &str) -> String {
        let (masked, numbers) = mask(name);
        let mut end = masked.len();
        loop {
            if let Some(to) = self.0.get(&masked[..end]) {
                return unmask(&format!("{to}{}", &masked[end..]), &numbers);
            }
            match masked[..end].rfind('.') {
                Some(dot) => end = dot,
                None => return name.to_owned(),
            }
        }
    }
}

/// `layers.12.q` -> `layers.#.q` and `["12"]`.
pub(super) fn mask(name: &str) -> (String, Vec<&str>) {
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let numbers = name.split('.').filter(is_number).collect();
    let masked: Vec<&str> = name.split('.').map(|part| if is_number(&part) { "#" } else { part }).collect();
    (masked.join("."), numbers)
}

/// Puts numbers in the places of `#`, in their order.
fn unmask(name: &str, numbers: &[&str]) -> String {
    let mut numbers = numbers.iter();
    let parts = name.split('.').map(|part| if part == "#" { *numbers.next().unwrap_or(&"#") } else { part });
    parts.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_decides_and_numbers_keep_their_order() {
        let rules = [("vit.layers.#.attention.q_proj", "vit.encoder.layer.#.attention.attention.query"), ("vit", "v")];
        let renaming = Renaming(rules.map(|(a, b)| (a.to_owned(), b.to_owned())).into());
        let stored = "vit.encoder.layer.10.attention.attention.query.weight";
        assert_eq!(renaming.apply("vit.layers.10.attention.q_proj.weight"), stored);
        assert_eq!(renaming.reversed().apply(stored), "vit.layers.10.attention.q_proj.weight");
        assert_eq!(renaming.apply("vit.pooler.dense.weight"), "v.pooler.dense.weight");
        assert_eq!(renaming.apply("classifier.weight"), "classifier.weight");
    }
}
