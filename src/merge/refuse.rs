//! What nobody can merge is named, not skipped.

use super::plan::Output;
use crate::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    error::{Error, Result},
};

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
