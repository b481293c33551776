//! An adapter: `scaling * B @ A` of every module.

use super::super::{
    Reason, Skipped,
    factors::CycleFactors,
    names::{self, ModuleId},
    task::{Delta, Task, skipped},
};
use crate::{
    adapter::{Adapter, LoraModule, types},
    checkpoint::{Dtype, Filter, natural_key},
    error::{Error, Result},
};

/// Adds the modules of an adapter to `tasks`.
pub(super) fn list<'a>(
    label: &str,
    adapter: &'a Adapter,
    filter: &Filter,
    tasks: &mut Vec<Task<'a>>,
    skip: &mut Vec<Skipped>,
) -> Result<()> {
    if adapter.kind().id() != "LORA" {
        return list_updates(label, adapter, filter, tasks, skip);
    }
    let modules = low_rank_modules(label, adapter, filter, skip)?;
    let ids = names::module_ids(modules.iter().map(|m| m.name));
    for (module, id) in modules.into_iter().zip(ids) {
        let modules = vec![(module, adapter.config().fan_in_fan_out)];
        tasks.push(task(label, id, CycleFactors { modules, merged_into: None }, None));
    }
    Ok(())
}

/// Adds the modules of an adapter of another type than LoRA.
fn list_updates<'a>(
    label: &str,
    adapter: &'a Adapter,
    filter: &Filter,
    tasks: &mut Vec<Task<'a>>,
    skip: &mut Vec<Skipped>,
) -> Result<()> {
    let mut modules: Vec<_> = adapter.modules().filter(|module| filter.takes(&module.tensor_name())).collect();
    modules.sort_by_cached_key(|module| natural_key(module.name()));
    let ids = names::module_ids(modules.iter().map(|module| module.name()));
    for (module, id) in modules.iter().zip(ids) {
        let Some(planned) = types::plan_alone(module)? else {
            let (name, path) = (module.name(), adapter.path().display());
            return Err(Error::request(format!(
                "what {} changes in '{name}' depends on the base, which '{path}' does not hold",
                adapter.kind().name()
            ))
            .help("merge the adapter with `relora-kit merge`, then pass --base and --tuned"));
        };
        tasks.push(Task {
            label: label.to_owned(),
            name: module.tensor_name(),
            module: id,
            shape: planned.shape,
            dtype: planned.tensors.first().map_or(Dtype::F32, |tensor| tensor.dtype()),
            r: Some(planned.rank).filter(|rank| *rank > 0),
            cycles: None,
            delta: Delta::Adapter(planned),
        });
    }
    skip_others(label, adapter, filter, skip);
    Ok(())
}

/// Lists the tensors that are stored in full.
fn skip_others(label: &str, adapter: &Adapter, filter: &Filter, skip: &mut Vec<Skipped>) {
    for (name, _, tensor) in adapter.others().filter(|(name, ..)| filter.takes(name)) {
        let weight = tensor.shape().len() > 1;
        skip.push(skipped(name, label, Reason::NotLowRank, "it is stored in full".into(), weight));
    }
}

/// The task for the deltas of one module, named and shaped as the last of them.
pub(super) fn task<'a>(label: &str, id: ModuleId, factors: CycleFactors<'a>, cycles: Option<Vec<u64>>) -> Task<'a> {
    let (module, fan_in_fan_out) = factors.modules[factors.modules.len() - 1];
    Task {
        label: label.to_owned(),
        name: module.tensor_name(),
        module: id,
        shape: stored_shape(&module, fan_in_fan_out),
        dtype: module.a.dtype(),
        r: Some(module.r),
        cycles,
        delta: Delta::Factored(factors),
    }
}

/// `(rows, columns)` of the weight that the delta of a module is added to.
pub(super) fn stored_shape(module: &LoraModule, fan_in_fan_out: bool) -> (usize, usize) {
    match fan_in_fan_out || module.embedding {
        true => (module.in_features, module.out_features),
        false => (module.out_features, module.in_features),
    }
}

/// The modules whose delta is `scaling * B @ A` and nothing else, in reading order. Tensors trained in full go to `skip`.
pub(super) fn low_rank_modules<'a>(
    label: &str,
    adapter: &'a Adapter,
    filter: &Filter,
    skip: &mut Vec<Skipped>,
) -> Result<Vec<LoraModule<'a>>> {
    let mut modules = Vec::new();
    for module in adapter.lora_modules() {
        let module = module?;
        if !filter.takes(&module.tensor_name()) {
            continue;
        }
        let refuse = |what: &str| {
            Error::request(format!(
                "the delta of '{}' in '{}' is not B @ A alone: {what}",
                module.name,
                adapter.path().display()
            ))
            .help("merge the adapter with `relora-kit merge`, then pass --base and --tuned")
        };
        if module.magnitude.is_some() {
            return Err(refuse("DoRA scales it with the norms of the base weight"));
        }
        if module.diag.is_some() {
            return Err(refuse("KaSA replaces some of the base's singular parts"));
        }
        if module.experts > 1 {
            return Err(refuse("the factors of several experts are stacked"));
        }
        modules.push(module);
    }
    skip_others(label, adapter, filter, skip);
    modules.sort_by_cached_key(|m| natural_key(m.name));
    Ok(modules)
}
