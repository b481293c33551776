//! What cannot be merged, and why: each refusal names the cause.

use super::plan::Output;
use crate::{
    adapter::Adapter,
    architecture::Architecture,
    checkpoint::{Checkpoint, Tensor, encodings},
    error::{Error, Result},
};
use serde_json::Value;

/// DoRA rescales the sum of base and delta: there is no sum with other deltas that all agree on.
pub(super) fn ambiguous_dora(output: &Output) -> Result<()> {
    let deltas = output.updates.len();
    match output.updates.iter().find(|update| update.alone) {
        Some(dora) if deltas > 1 => Err(Error::request(format!(
            "cannot merge '{}': '{}' rescales it (DoRA) and {} other deltas are added to it",
            output.spec.name,
            dora.file.display(),
            deltas - 1
        ))
        .help("merge them one after the other, in the order they were trained")),
        _ => Ok(()),
    }
}

/// Ends of names of what quantisation stores beside packed or narrow weights, for configurations that do not tell.
const SCALES: [&str; 9] = [
    ".weight_scale_inv",
    ".weight_scale",
    ".weight_packed",
    ".weight.absmax",
    ".weight.quant_map",
    ".SCB",
    ".qweight",
    ".scales",
    "_blocks",
];

/// How the base says or shows that it is quantised: by its configuration, or by scales beside its weights.
pub(super) fn quantisation(base: &Checkpoint, config: &Value) -> Option<String> {
    if let Some(declared) = encodings::declared(config) {
        let method = if declared.method.is_empty() { "unnamed".to_owned() } else { declared.method };
        return Some(format!("config.json: {} {method}", declared.key));
    }
    let scale = base.tensors().find(|t| SCALES.iter().any(|end| t.name().ends_with(end)))?;
    Some(format!("it stores '{}'", scale.name()))
}

/// Whether the values of `weight` are only half of the weight: scales for it lie beside it.
pub(super) fn is_encoded(base: &Checkpoint, weight: &str) -> bool {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let beside = ["_scale_inv", "_scale", ".absmax", ".quant_map"].map(|end| format!("{weight}{end}"));
    beside.iter().any(|name| base.get(name).is_some())
        || [".SCB", ".qweight", ".scales"].iter().any(|end| base.get(&format!("{module}{end}")).is_some())
}

/// The refusal of a merge that would have to change quantised weights.
pub(super) fn quantised(base: &Checkpoint, how: &str, what: &str) -> Error {
    Error::request(format!("{what}: the base '{}' is quantised ({how})", base.path().display())).help(
        "merge into the model that it was quantised from, or save it decoded first: transformers' `model.dequantize()`",
    )
}

/// Refuses a saved tensor without values.
pub(super) fn empty(adapter: &Adapter, tensor: &Tensor) -> Result<()> {
    if tensor.elements() > 0 {
        return Ok(());
    }
    Err(Error::request(format!(
        "'{}' in '{}' is empty, shape {:?}",
        tensor.name(),
        adapter.file().path().display(),
        tensor.shape()
    ))
    .help("it was saved under DeepSpeed ZeRO-3 or FSDP without gathering its values: save the adapter again from the gathered model"))
}

/// Refuses an adapter of which some tensors have no target, lists these, and names the cause where it is known.
pub(super) fn orphans(
    base: &Checkpoint,
    config: &Value,
    architecture: &Architecture,
    adapter: &Adapter,
    orphans: Vec<&str>,
) -> Result<()> {
    const SHOWN: usize = 20;
    if orphans.is_empty() {
        return Ok(());
    }
    if let Some(how) = quantisation(base, config) {
        return Err(quantised(base, &how, &format!("cannot merge '{}'", orphans[0])));
    }
    for module in adapter.modules() {
        let owner = module.name().trim_end_matches(".base_layer");
        let in_proj = format!("{owner}.in_proj_weight");
        if base.get(&in_proj).is_some() && orphans.iter().any(|name| module.tensors().any(|t| t.name() == *name)) {
            return Err(Error::request(format!(
                "module '{owner}' of adapter '{}' is an nn.MultiheadAttention ('{in_proj}' in the base): its factors \
                 cannot be merged",
                adapter.path().display()
            ))
            .help("merge this adapter with PEFT"));
        }
    }
    let mut list = orphans.iter().take(SHOWN).map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", ");
    if orphans.len() > SHOWN {
        list += &format!(" and {} more", orphans.len() - SHOWN);
    }
    let fused = adapter.config().target_parameters.iter().flatten().find_map(|target| {
        let owners = adapter.modules().map(|m| m.name().trim_end_matches(".base_layer").to_owned());
        let parameter = target.rsplit('.').next()?.to_owned();
        owners.into_iter().find_map(|owner| architecture.split(&format!("{owner}.{parameter}")))
    });
    let cause = match fused {
        Some(stored) => {
            format!("; the base stores these experts one by one ('{}'), not as one tensor", stored.join("', '"))
        }
        None => String::new(),
    };
    let trained_on = adapter.config().base_model_name_or_path.as_deref().unwrap_or("an unnamed model");
    let help = match fused {
        Some(_) => "merge this adapter with PEFT, which loads the base fused".to_owned(),
        None => format!(
            "the adapter was trained on '{trained_on}'; if that is this base under other names, --map FROM=TO renames; \
             nothing was written"
        ),
    };
    Err(Error::request(format!(
        "{} of {} tensors of adapter '{}' match nothing in the base '{}': {list}{cause}",
        orphans.len(),
        adapter.file().tensors().len(),
        adapter.path().display(),
        base.path().display()
    ))
    .help(help))
}
