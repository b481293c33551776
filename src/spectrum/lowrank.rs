//! Sources whose deltas are stored as factors: an adapter, or every cycle of a run.

use super::{
    Reason, Skipped, names,
    noise::UlpSums,
    source::{Job, Work, skipped},
};
use crate::{
    adapter::{Adapter, LoraModule},
    checkpoint::{Checkpoint, Filter, Tensor, natural_key},
    delta::LowRank,
    error::{Error, Result},
    run::{Manifest, RunDir},
};
use std::path::Path;

/// The factors of one weight's deltas, one per cycle.
pub(super) struct Factors<'a> {
    stages: Vec<(LoraModule<'a>, bool)>,
    /// The weight the deltas are merged into; what rounding it can add counts as noise.
    weight: Option<Tensor<'a>>,
}

impl Factors<'_> {
    /// Reads them as f64, exactly.
    pub fn read(&self) -> Result<Vec<LowRank<f64>>> {
        self.stages.iter().map(|(module, fan_in_fan_out)| module.low_rank(*fan_in_fan_out)).collect()
    }

    /// Sum of the ranks of all cycles.
    pub fn total_rank(&self) -> usize {
        self.stages.iter().map(|(module, _)| module.r).sum()
    }

    /// Units in the last place of the weight the deltas are merged into.
    pub fn ulps(&self) -> Result<UlpSums> {
        let Some(weight) = self.weight else { return Ok(UlpSums::new(0, 0)) };
        let (m, n) = weight.matrix_shape()?;
        let mut sums = UlpSums::new(m, n);
        let mut row = vec![0.0; n];
        for i in 0..m {
            weight.read_f64(i * n, &mut row)?;
            sums.add(weight.dtype(), i, 0, &row);
        }
        Ok(sums)
    }
}

/// Adds the modules of an adapter to `jobs`.
pub(super) fn plan_adapter<'a>(
    label: &str,
    adapter: &'a Adapter,
    filter: &Filter,
    jobs: &mut Vec<Job<'a>>,
    skip: &mut Vec<Skipped>,
) -> Result<()> {
    let modules = low_rank_modules(label, adapter, filter, skip)?;
    let places = names::places(modules.iter().map(|m| m.name));
    for (module, place) in modules.into_iter().zip(places) {
        let stages = vec![(module, adapter.config().fan_in_fan_out)];
        jobs.push(job(label, place, Factors { stages, weight: None }, None));
    }
    Ok(())
}

fn job<'a>(label: &str, place: names::Place, factors: Factors<'a>, cycles: Option<Vec<u64>>) -> Job<'a> {
    let (module, fan_in_fan_out) = factors.stages[factors.stages.len() - 1];
    Job {
        label: label.to_owned(),
        name: module.tensor_name(),
        place,
        shape: stored_shape(&module, fan_in_fan_out),
        dtype: module.a.dtype(),
        r: Some(module.r),
        cycles,
        work: Work::Factors(factors),
    }
}

fn stored_shape(module: &LoraModule, fan_in_fan_out: bool) -> (usize, usize) {
    match fan_in_fan_out || module.embedding {
        true => (module.in_features, module.out_features),
        false => (module.out_features, module.in_features),
    }
}

/// The modules whose delta is `scaling * B @ A` and nothing else, in reading order. Tensors trained in full go to `skip`.
fn low_rank_modules<'a>(
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
        if module.experts > 1 {
            return Err(refuse("the factors of several experts are stacked"));
        }
        modules.push(module);
    }
    for (name, _, _) in adapter.others().filter(|(name, ..)| filter.takes(name)) {
        skip.push(skipped(name, label, Reason::NotLowRank, "it is stored in full".into()));
    }
    modules.sort_by_cached_key(|m| natural_key(m.name));
    Ok(modules)
}

/// A run directory: its cycles, and the weights they were merged into.
pub(super) struct OpenedRun {
    dir: RunDir,
    manifest: Manifest,
    cycles: Vec<Adapter>,
    weights: Option<Checkpoint>,
}

impl OpenedRun {
    pub fn open(path: &Path) -> Result<OpenedRun> {
        let dir = RunDir(path.to_owned());
        let manifest = dir.manifest()?;
        if manifest.cycles.is_empty() {
            return Err(Error::request(format!("run '{}' has no finished cycle", path.display())).help(
                "wait for its first restart; for full-rank training compare checkpoints with --base and --tuned",
            ));
        }
        let cycles = manifest.cycles.iter().map(|c| Adapter::open(&path.join(&c.folder))).collect::<Result<_>>()?;
        let weights = match &manifest.checkpoint {
            Some(checkpoint) => Some(Checkpoint::open(&path.join(&checkpoint.folder))?),
            None => None,
        };
        Ok(OpenedRun { dir, manifest, cycles, weights })
    }

    pub fn path(&self) -> &Path {
        &self.dir.0
    }

    /// The number of the last cycle.
    pub fn cycles(&self) -> u64 {
        self.manifest.cycles.last().map_or(0, |c| c.cycle)
    }

    /// Adds one job per weight, over all cycles.
    pub fn plan<'a>(
        &'a self,
        label: &str,
        filter: &Filter,
        jobs: &mut Vec<Job<'a>>,
        skip: &mut Vec<Skipped>,
    ) -> Result<()> {
        let mut stages: Vec<Vec<(LoraModule, bool)>> = Vec::new();
        for (i, adapter) in self.cycles.iter().enumerate() {
            // What is stored in full is stored in every cycle: it is listed once.
            let mut repeated = Vec::new();
            let modules = low_rank_modules(label, adapter, filter, if i == 0 { &mut *skip } else { &mut repeated })?;
            let fan_in_fan_out = adapter.config().fan_in_fan_out;
            if i == 0 {
                stages = modules.into_iter().map(|m| vec![(m, fan_in_fan_out)]).collect();
                continue;
            }
            self.check_same_modules(i, &stages, &modules)?;
            stages.iter_mut().zip(modules).for_each(|(stage, module)| stage.push((module, fan_in_fan_out)));
        }
        let numbers: Vec<u64> = self.manifest.cycles.iter().map(|c| c.cycle).collect();
        let places = names::places(stages.iter().map(|s| s[0].0.name));
        for (stages, place) in stages.iter().zip(places) {
            let name = stages[0].0.tensor_name();
            let weight = self.weights.as_ref().map(|w| w.tensor(&name)).transpose()?;
            let factors = Factors { stages: stages.clone(), weight };
            jobs.push(job(label, place, factors, Some(numbers.clone())));
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
        for (stage, module) in before.iter().zip(here) {
            let (first, fan) = stage[0];
            let (a, b) = (stored_shape(&first, fan), stored_shape(module, fan));
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
