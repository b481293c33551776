//! What the configuration says about targets that are no modules: expert parameters and token rows.

use super::{matcher::Matcher, names::Mapping};
use crate::{
    adapter::{Adapter, AdapterConfig, LoraModule},
    error::{Error, Result},
};
use serde_json::Value;

/// Models whose expert parameters are stored `[experts, in, out]`; the others store `[experts, out, in]`.
const STORED_IN_OUT: [&str; 3] = ["gpt_oss", "llama4", "llama4_text"];

/// Whether the base's expert parameters are stored `[experts, in, out]`, which only matters where both are the same.
pub(super) fn stored_transposed(config: &Value) -> bool {
    config["model_type"].as_str().is_some_and(|model| STORED_IN_OUT.contains(&model))
}

/// The place of the parameter that `module` changes, for adapters with `target_parameters`.
///
/// PEFT wraps a module once per targeted parameter, each wrap adding `base_layer` to the names of those before, and stores
/// no parameter names. The shapes tell which is which; where they do not, the order in which models define them does.
pub(super) fn find<'a>(
    matcher: &Matcher<'a>,
    adapter: &Adapter,
    mapping: &Mapping,
    module: &LoraModule,
    all: &[LoraModule],
) -> Result<Option<usize>> {
    let Some(targets) = adapter.config().target_parameters.as_ref().filter(|t| !t.is_empty()) else { return Ok(None) };
    let owner = module.name.trim_end_matches(".base_layer");
    let depth = |m: &LoraModule| m.name.matches(".base_layer").count();
    let mut candidates: Vec<(String, usize)> = targets
        .iter()
        .filter_map(|target| {
            let parameter = target.rsplit('.').next()?;
            let name = format!("{owner}.{parameter}");
            let targeted = name == *target || name.ends_with(&format!(".{target}"));
            Some((name.clone(), matcher.place(mapping, &name).filter(|_| targeted)?))
        })
        .collect();
    candidates.sort_by_key(|(name, _)| definition_order(name));
    let fits = |m: &LoraModule, place: usize| match *matcher.plan.outputs[place].source.shape() {
        [e, x, y] => {
            e == m.experts && ([m.out_features, m.in_features] == [x, y] || [m.out_features, m.in_features] == [y, x])
        }
        ref shape => m.experts == 1 && shape == [m.out_features, m.in_features],
    };
    let fitting: Vec<_> = candidates.iter().filter(|(_, place)| fits(module, *place)).collect();
    match fitting[..] {
        [] => Ok(None),
        [(_, place)] => Ok(Some(*place)),
        _ => {
            // The outermost wrap is the last parameter that was targeted.
            let mut wraps: Vec<_> = all.iter().filter(|m| m.name.trim_end_matches(".base_layer") == owner).collect();
            wraps.sort_by_key(|m| std::cmp::Reverse(depth(m)));
            let position = wraps.iter().position(|m| m.name == module.name);
            let known = candidates.iter().all(|(name, _)| definition_order(name) < usize::MAX);
            match position.and_then(|i| candidates.get(i)) {
                Some((_, place)) if known && candidates.len() == wraps.len() => Ok(Some(*place)),
                _ => Err(Error::request(format!(
                    "cannot tell which parameter of '{owner}' the factors '{}' in '{}' belong to",
                    module.a.name(),
                    adapter.file().path().display()
                ))
                .help("their shapes fit several; merge this adapter with PEFT")),
            }
        }
    }
}

/// In which order models define the expert parameters that are targeted in practice.
fn definition_order(name: &str) -> usize {
    let known = ["gate_up_proj", "down_proj"];
    known.iter().position(|k| name.ends_with(k)).unwrap_or(usize::MAX)
}

/// `trainable_token_indices` of the embedding `module`: one list for the input embedding, or a list per module.
pub(super) fn token_indices(config: &AdapterConfig, module: &str) -> Option<Vec<usize>> {
    let list = match config.trainable_token_indices.as_ref().or_else(|| config.raw.get("token_indices"))? {
        Value::Object(by_module) => {
            by_module.iter().find(|(key, _)| module == *key || module.ends_with(&format!(".{key}")))?.1
        }
        list => list,
    };
    list.as_array()?.iter().map(|i| Some(i.as_u64()? as usize)).collect()
}
