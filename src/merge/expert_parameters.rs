//! What the configuration says about targets that are no modules: expert parameters and token rows.

use crate::{
    adapter::{Adapter, AdapterConfig, LoraModule, Module},
    error::{Error, Result},
};
use serde_json::Value;

/// The parameter of a base that a module of an adapter with `target_parameters` changes.
pub(super) struct Target {
    /// Its place in the plan.
    pub place: usize,
    /// The module with the rank and the scaling that the parameter's own name gives it: PEFT matches `rank_pattern` and
    /// `alpha_pattern` with `model.layers.0.mlp.experts.down_proj`, not with the module's name.
    pub r: usize,
    pub scaling: f64,
}

/// The place of the parameter that `module` changes, for adapters with `target_parameters`. `place` finds a parameter in the
/// base, `shape` gives the extents of what is there.
///
/// PEFT wraps a module once per targeted parameter, each wrap adding `base_layer` to the names of those before, and stores
/// no parameter names. The shapes tell which is which; where they do not, the order in which models define them does.
pub(super) fn find<'s>(
    place: impl Fn(&str) -> Option<usize>,
    shape: impl Fn(usize) -> &'s [usize],
    adapter: &Adapter,
    module: &Module,
    all: &[Module],
) -> Result<Option<Target>> {
    let Some(targets) = adapter.config().target_parameters.as_ref().filter(|t| !t.is_empty()) else { return Ok(None) };
    let owner = module.name().trim_end_matches(".base_layer");
    let depth = |m: &Module| m.name().matches(".base_layer").count();
    let mut candidates: Vec<(String, usize)> = targets
        .iter()
        .filter_map(|target| {
            let parameter = target.rsplit('.').next()?;
            let name = format!("{owner}.{parameter}");
            let targeted = name == *target || name.ends_with(&format!(".{target}"));
            Some((name.clone(), place(&name).filter(|_| targeted)?))
        })
        .collect();
    candidates.sort_by_key(|(name, _)| definition_order(name));
    let target = |(name, place): &(String, usize)| -> Result<Option<Target>> {
        let Some(m) = LoraModule::of_parameter(module, name)? else { return Ok(None) };
        let fits = match *shape(*place) {
            [e, x, y] => {
                e == m.experts
                    && ([m.out_features, m.in_features] == [x, y] || [m.out_features, m.in_features] == [y, x])
            }
            ref shape => m.experts == 1 && shape == [m.out_features, m.in_features],
        };
        Ok(fits.then_some(Target { place: *place, r: m.r, scaling: m.scaling }))
    };
    let mut fitting = Vec::new();
    for candidate in &candidates {
        fitting.extend(target(candidate)?.map(|target| (candidate, target)));
    }
    if fitting.len() < 2 {
        return Ok(fitting.pop().map(|(_, target)| target));
    }
    // The outermost wrap is the last parameter that was targeted.
    let mut wraps: Vec<_> = all.iter().filter(|m| m.name().trim_end_matches(".base_layer") == owner).collect();
    wraps.sort_by_key(|m| std::cmp::Reverse(depth(m)));
    let position = wraps.iter().position(|m| m.name() == module.name());
    let known = candidates.iter().all(|(name, _)| definition_order(name) < usize::MAX);
    let by_order = position.and_then(|i| candidates.get(i)).filter(|_| known && candidates.len() == wraps.len());
    match fitting.into_iter().find(|(candidate, _)| Some(*candidate) == by_order) {
        Some((_, target)) => Ok(Some(target)),
        None => Err(Error::request(format!(
            "cannot tell which parameter of '{owner}' the factors '{}' in '{}' belong to",
            module.tensors().next().map_or("", |t| t.name()),
            adapter.file().path().display()
        ))
        .help("their shapes fit several; merge this adapter with PEFT")),
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
