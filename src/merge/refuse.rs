//! What nobody can merge is named, not skipped.

use super::plan::Output;
use crate::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    error::{Error, Result},
};
use serde_json::Value;

/// Initialisations that change the base's weights, too: the delta fits only the changed base.
const CHANGES_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Settings that make the update something else than a delta of stored weights.
const NO_DELTA: [(&str, &str); 4] = [
    ("alora_invocation_tokens", "an activated LoRA works on some tokens only"),
    ("layer_replication", "it was trained on a model with replicated layers"),
    ("arrow_config", "Arrow routes each token to adapters of its own"),
    ("use_qalora", "QALoRA pools the layer's input"),
];

/// Refuses adapters whose update is no delta of the base's weights.
pub(super) fn unmergeable(adapter: &Adapter) -> Result<()> {
    let refuse = |what: String, help: &str| {
        let path = adapter.path().display();
        Err(Error::request(format!("adapter '{path}' cannot be merged: {what}")).help(help))
    };
    let config = adapter.config();
    if let Value::String(init) = &config.init_lora_weights
        && let Some(method) = CHANGES_THE_BASE.iter().find(|m| init.to_lowercase().starts_with(**m))
    {
        let help = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it fit the original base";
        return refuse(
            format!("init_lora_weights is '{init}': {method} changed the base's weights before training"),
            help,
        );
    }
    let set = |value: &&Value| !matches!(value, Value::Null | Value::Bool(false));
    if let Some((key, why)) = NO_DELTA.iter().find(|(key, _)| config.other.get(*key).filter(set).is_some()) {
        return refuse(format!("{key} is set: {why}"), "PEFT cannot merge it either: use it unmerged");
    }
    if config.use_dora {
        let incomplete = adapter.modules().flatten().find(|m| m.magnitude.is_none());
        if let Some(module) = incomplete {
            return refuse(format!("use_dora is set but '{}' has no magnitude", module.name), "save the adapter again");
        }
    } else if let Some(tensor) = adapter.modules().flatten().find_map(|m| m.magnitude) {
        return refuse(format!("it holds '{}' but use_dora is not set", tensor.name()), "correct adapter_config.json");
    }
    Ok(())
}

/// DoRA rescales the sum of base and delta: there is no sum with other deltas that all agree on.
pub(super) fn ambiguous_dora(output: &Output) -> Result<()> {
    let deltas = output.terms.iter().filter(|t| t.rank() > 0).count();
    match output.dora() {
        Some((module, _)) if deltas > 1 => Err(Error::request(format!(
            "cannot merge '{}': '{}' rescales it (DoRA) and {} other deltas are added to it",
            output.spec.name,
            module.a.file().path().display(),
            deltas - 1
        ))
        .help("merge them one after the other, in the order they were trained")),
        _ => Ok(()),
    }
}

/// Refuses an adapter of which some tensors have no target, and lists these.
pub(super) fn orphans(base: &Checkpoint, adapter: &Adapter, orphans: Vec<&str>) -> Result<()> {
    const SHOWN: usize = 20;
    if orphans.is_empty() {
        return Ok(());
    }
    let mut list = orphans.iter().take(SHOWN).map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", ");
    if orphans.len() > SHOWN {
        list += &format!(" and {} more", orphans.len() - SHOWN);
    }
    let trained_on = adapter.config().base_model_name_or_path.as_deref().unwrap_or("an unnamed model");
    Err(Error::request(format!(
        "{} of {} tensors of adapter '{}' match nothing in the base '{}': {list}",
        orphans.len(),
        adapter.file().tensors().len(),
        adapter.path().display(),
        base.path().display()
    ))
    .help(format!("the adapter was trained on '{trained_on}'; nothing was written")))
}

/// The hint for shapes that do not fit.
pub(super) fn other_model(adapter: &Adapter) -> String {
    match &adapter.config().base_model_name_or_path {
        Some(name) => format!("the adapter was trained on '{name}'; merge it into that model"),
        None => "the adapter seems made for another model".to_owned(),
    }
}
