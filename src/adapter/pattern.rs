//! `rank_pattern` and `alpha_pattern`: numbers by regular expressions over module names.

use regex::{Regex, RegexBuilder};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, MapAccess, Visitor},
    ser::SerializeMap,
};
use std::fmt;

/// Bytes of one compiled pattern.
const MAX_REGEX: usize = 1 << 20;

/// Patterns in the order of the JSON object; the first that matches a module name decides.
///
/// PEFT's rule is `re.match("(.*\.)?(KEY)$", name)`: a key matches a whole name or its end after a dot, and a leading
/// `^` pins it to the start.
#[derive(Clone, Debug, Default)]
pub struct PatternMap {
    entries: Vec<(String, Regex, f64)>,
}

impl PatternMap {
    /// The value of the first pattern that matches `module`.
    pub fn get(&self, module: &str) -> Option<f64> {
        self.entries.iter().find(|(_, regex, _)| regex.is_match(module)).map(|&(.., value)| value)
    }

    /// Whether there are no patterns.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends a pattern.
    pub fn push(&mut self, key: &str, value: f64) -> Result<(), regex::Error> {
        // A few bytes of repetitions can ask for any amount of memory.
        let regex = RegexBuilder::new(&format!(r"^(?:(?:.*\.)?(?:{key}))$")).size_limit(MAX_REGEX).build()?;
        self.entries.push((key.to_owned(), regex, value));
        Ok(())
    }
}

impl<'de> Deserialize<'de> for PatternMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = PatternMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns and numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PatternMap, A::Error> {
                let mut patterns = PatternMap::default();
                while let Some((key, value)) = map.next_entry::<String, f64>()? {
                    patterns
                        .push(&key, value)
                        .map_err(|e| A::Error::custom(format!("pattern '{key}' is not supported: {e}")))?;
                }
                Ok(patterns)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Serialize for PatternMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (key, _, value) in &self.entries {
            // PEFT expects integers where it wrote integers.
            if value.fract() == 0.0 {
                map.serialize_entry(key, &(*value as i64))?;
            } else {
                map.serialize_entry(key, value)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_as_in_peft() {
        let patterns: PatternMap = serde_json::from_str(
            r#"{"^model.layers.0.self_attn.v_proj": 2, "layers\\.1\\.mlp": 12, "q_proj|k_proj": 4}"#,
        )
        .unwrap();
        assert_eq!(patterns.get("model.layers.0.self_attn.v_proj"), Some(2.0));
        assert_eq!(patterns.get("other.model.layers.0.self_attn.v_proj"), None);
        assert_eq!(patterns.get("model.layers.1.mlp"), Some(12.0));
        assert_eq!(patterns.get("model.layers.1.mlp.up_proj"), None);
        assert_eq!(patterns.get("a.k_proj"), Some(4.0));
        assert_eq!(patterns.get("a.fast_k_proj"), None);
        assert_eq!(serde_json::to_string(&patterns).unwrap().matches(":2").count(), 1);
    }
}
