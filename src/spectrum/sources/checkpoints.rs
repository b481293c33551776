//! Two checkpoints: the matrices that both hold.

use super::super::{
    Options, Reason, Skipped, names,
    noise::known::History,
    pair::Pair,
    task::{Delta, Task, skipped},
};
use crate::{
    checkpoint::{Checkpoint, Dtype, Filter, Tensor, dtype, natural_key},
    error::{Error, Result},
};

/// Adds the matrices that both checkpoints hold to `tasks`, and every other tensor to `skip` or refuses it.
pub(super) fn list<'a>(
    label: &str,
    (base, tuned): (&'a Checkpoint, &'a Checkpoint),
    history: &History,
    filter: &Filter,
    options: &Options,
    tasks: &mut Vec<Task<'a>>,
    skip: &mut Vec<Skipped>,
) -> Result<()> {
    check_common(label, base, tuned, filter, options.common_only, skip)?;
    let mut pairs = Vec::new();
    for before in base.tensors().filter(|t| filter.takes(t.name())) {
        let Some(after) = tuned.get(before.name()) else { continue };
        if before.shape() != after.shape() {
            return Err(Error::request(format!(
                "tensor '{}' has shape {:?} in '{}' but {:?} in '{}'",
                before.name(),
                before.shape(),
                before.file().path().display(),
                after.shape(),
                after.file().path().display()
            ))
            .help("compare a checkpoint with the one it was trained from"));
        }
        match why_not_measured(&before, &after) {
            Some((reason, detail, weight)) => skip.push(skipped(before.name(), label, reason, detail, weight)),
            None => {
                let roundings = history.terms(before.name());
                pairs.push(Pair { base: before, tuned: after, shape: before.matrix_shape()?, roundings });
            }
        }
    }
    // In the order of the base's names, so that layers come in reading order whatever the shards.
    pairs.sort_by_cached_key(|p| natural_key(p.tuned.name()));
    let modules = names::module_ids(pairs.iter().map(|p| p.tuned.name()));
    tasks.extend(pairs.into_iter().zip(modules).map(|(pair, module)| Task {
        label: label.to_owned(),
        name: pair.tuned.name().to_owned(),
        module,
        shape: pair.shape,
        dtype: pair.tuned.dtype(),
        r: options.rank,
        cycles: None,
        delta: Delta::Difference(pair),
    }));
    Ok(())
}

/// Refuses tensors that only one side has, or notes them with `--common-only`.
fn check_common(
    label: &str,
    base: &Checkpoint,
    tuned: &Checkpoint,
    filter: &Filter,
    common_only: bool,
    skip: &mut Vec<Skipped>,
) -> Result<()> {
    let mut lonely = Vec::new();
    for (here, there) in [(base, tuned), (tuned, base)] {
        for tensor in here.tensors().filter(|t| filter.takes(t.name()) && there.get(t.name()).is_none()) {
            lonely.push((tensor.name(), here.path(), tensor.shape().len() > 1));
        }
    }
    if !common_only && let Some((first, side, _)) = lonely.first() {
        let list: Vec<String> = lonely
            .iter()
            .take(10)
            .map(|(name, side, _)| format!("\n  {name} (only in '{}')", side.display()))
            .collect();
        let more = if lonely.len() > 10 { format!("\n  and {} more", lonely.len() - 10) } else { String::new() };
        return Err(Error::request(format!(
            "source '{label}': {} tensors are on one side only, first '{first}' in '{}'{}{more}",
            lonely.len(),
            side.display(),
            list.concat(),
        ))
        .help("pass --common-only to measure the others, or --filter to choose"));
    }
    for (name, side, weight) in lonely {
        skip.push(skipped(name, label, Reason::OneSideOnly, format!("only in '{}'", side.display()), weight));
    }
    Ok(())
}

/// Why a tensor is not measured, in words, and whether it is a weight, whose update is then unknown.
fn why_not_measured(before: &Tensor, after: &Tensor) -> Option<(Reason, String, bool)> {
    for tensor in [before, after] {
        let several = tensor.shape().len() > 1;
        if tensor.shape().len() != 2 {
            // Stacks of matrices (experts, kernels) are weights; vectors have no rank to speak of.
            return Some((Reason::NotAMatrix, format!("its shape is {:?}", tensor.shape()), several));
        }
        if dtype::is_float(tensor.dtype()) {
            continue;
        }
        let detail = format!("it is stored as {:?}", tensor.dtype());
        if !is_integer(tensor.dtype()) {
            return Some((Reason::UnreadableType, detail, true));
        }
        // Buffers such as position numbers do not change; packed weights do, or are called so.
        let changed = before.dtype() != after.dtype() || before.bytes() != after.bytes();
        return Some((Reason::NotFloatingPoint, detail, changed || tensor.name().ends_with("weight")));
    }
    None
}

fn is_integer(dtype: Dtype) -> bool {
    use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, BOOL | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
}
