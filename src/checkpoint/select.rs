//! Choosing tensors by name, and the order people expect them in.

use crate::error::{Error, Result};
use globset::{Glob, GlobSet, GlobSetBuilder};

/// Globs over tensor names; without any, every name is taken.
#[derive(Clone, Debug, Default)]
pub struct Filter(Option<GlobSet>);

impl Filter {
    /// A name is taken if any of `globs` matches it; `*` matches dots, too.
    pub fn new(globs: &[String]) -> Result<Filter> {
        if globs.is_empty() {
            return Ok(Filter(None));
        }
        let mut set = GlobSetBuilder::new();
        for glob in globs {
            set.add(
                Glob::new(glob)
                    .map_err(|e| Error::request(format!("--filter '{glob}' is not a glob: {}", e.kind())))?,
            );
        }
        let set = set.build().map_err(|e| Error::request(format!("--filter: {e}")))?;
        Ok(Filter(Some(set)))
    }

    /// Whether `name` is chosen.
    pub fn takes(&self, name: &str) -> bool {
        self.0.as_ref().is_none_or(|set| set.is_match(name))
    }
}

/// Sorts `layers.10` after `layers.9`.
pub fn natural_key(name: &str) -> Vec<(u64, String)> {
    let part = |p: &str| p.parse::<u64>().map_or((0, p.to_owned()), |n| (n.saturating_add(1), String::new()));
    name.split('.').map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_choose_and_numbers_sort_as_numbers() {
        let filter = Filter::new(&["*norm*".into(), "lm_head.*".into()]).unwrap();
        assert!(filter.takes("model.layers.3.input_layernorm.weight") && filter.takes("lm_head.weight"));
        assert!(!filter.takes("model.embed_tokens.weight") && Filter::default().takes("anything"));
        assert!(Filter::new(&["[a".into()]).unwrap_err().message.contains("--filter '[a' is not a glob"));
        assert!(natural_key("layers.9.w") < natural_key("layers.10.w"));
    }
}
