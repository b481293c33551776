//! A run: the deltas of its cycles, and the weights they are merged into.

use super::{
    super::{Skipped, factors::CycleFactors, names, noise::known::History, task::Task},
    adapter,
};
use crate::{
    adapter::{Adapter, LoraModule},
    checkpoint::{Checkpoint, Filter},
    error::{Error, Result},
    run::{Manifest, RunDir},
};
use std::path::Path;

/// A run directory: its cycles, and the weights they were merged into.
pub(in crate::spectrum) struct OpenRun {
    dir: RunDir,
    manifest: Manifest,
    cycles: Vec<Adapter>,
    weights: Option<Checkpoint>,
    history: History,
}

impl OpenRun {
    pub fn open(path: &Path) -> Result<OpenRun> {
        let dir = RunDir(path.to_owned());
        let manifest = dir.manifest()?;
        if manifest.cycles.is_empty() {
            return Err(Error::request(format!("run '{}' has no finished cycle", path.display())).help(
                "wait for its first restart; for full-rank training compare checkpoints with --base and --tuned",
            ));
        }
        let cycles = manifest.cycles.iter().map(|c| Adapter::open(&path.join(&c.folder))).collect::<Result<_>>()?;
        let weights = match (&manifest.checkpoint, &manifest.base) {
            (Some(checkpoint), _) => Some(Checkpoint::open(&path.join(&checkpoint.folder))?),
            (None, Some(_)) => Some(Checkpoint::open(&dir.base_path())?),
            (None, None) => None,
        };
        let history = History::of_run(&manifest, manifest.cycles.len() as u64);
        Ok(OpenRun { dir, manifest, cycles, weights, history })
    }

    /// How the merges of its cycles round.
    pub fn history(&self) -> &History {
        &self.history
    }

    pub fn path(&self) -> &Path {
        &self.dir.0
    }

    /// The number of the last cycle.
    pub fn cycles(&self) -> u64 {
        self.manifest.cycles.last().map_or(0, |c| c.cycle)
    }

    /// Adds one task per weight, over all cycles.
    pub fn list<'a>(
        &'a self,
        label: &str,
        filter: &Filter,
        tasks: &mut Vec<Task<'a>>,
        skip: &mut Vec<Skipped>,
    ) -> Result<()> {
        let mut by_weight: Vec<Vec<(LoraModule, bool)>> = Vec::new();
        for (i, cycle) in self.cycles.iter().enumerate() {
            // What is stored in full is stored in every cycle: it is listed once.
            let mut repeated = Vec::new();
            let modules =
                adapter::low_rank_modules(label, cycle, filter, if i == 0 { &mut *skip } else { &mut repeated })?;
            let fan_in_fan_out = cycle.config().fan_in_fan_out;
            if i == 0 {
                by_weight = modules.into_iter().map(|m| vec![(m, fan_in_fan_out)]).collect();
                continue;
            }
            self.check_same_modules(i, &by_weight, &modules)?;
            by_weight.iter_mut().zip(modules).for_each(|(cycles, module)| cycles.push((module, fan_in_fan_out)));
        }
        let numbers: Vec<u64> = self.manifest.cycles.iter().map(|c| c.cycle).collect();
        let ids = names::module_ids(by_weight.iter().map(|cycles| cycles[0].0.name));
        // The terms of one merge.
        let once = History::of_run(&self.manifest, 1);
        for (modules, id) in by_weight.into_iter().zip(ids) {
            let name = modules[0].0.tensor_name();
            let weight = self.weights.as_ref().map(|w| w.tensor(&name)).transpose()?;
            let factors = CycleFactors { modules, merged_into: weight.map(|weight| (weight, once.terms(&name))) };
            tasks.push(adapter::task(label, id, factors, Some(numbers.clone())));
        }
        Ok(())
    }

    fn check_same_modules(&self, i: usize, before: &[Vec<(LoraModule, bool)>], here: &[LoraModule]) -> Result<()> {
        let known = |name: &str| before.iter().any(|s| s[0].0.name == name);
        let odd = here.iter().map(|m| m.name).find(|name| !known(name));
        let missing = before.iter().map(|s| s[0].0.name).find(|name| here.iter().all(|m| m.name != *name));
        if let Some(name) = odd.or(missing) {
            return Err(Error::request(format!(
                "cycles 1 and {} of run '{}' train different modules: '{name}' is in one of them only",
                i + 1,
                self.dir.0.display()
            ))
            .help("pass --filter to choose modules that every cycle trains"));
        }
        for (cycles, module) in before.iter().zip(here) {
            let (first, fan) = cycles[0];
            let (a, b) = (adapter::stored_shape(&first, fan), adapter::stored_shape(module, fan));
            if a != b {
                return Err(Error::request(format!(
                    "'{}' of run '{}' is {a:?} in cycle 1 but {b:?} in cycle {}",
                    module.name,
                    self.dir.0.display(),
                    i + 1
                )));
            }
        }
        Ok(())
    }
}
