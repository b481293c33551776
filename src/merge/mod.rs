//! Adding adapters to a checkpoint: plan (match, check, size), then stream every tensor once, copied or changed.
//!
//! `W' = round(W + sum_k weight_k * scaling_k * B_k @ A_k)`: the sum is computed in f32 (f64 where the weight is stored
//! as F64) and rounded once to the output's type. Tensors that nothing changes are copied byte for byte.

mod apply;
mod checks;
mod device;
mod dtype_advice;
mod estimate;
mod expert_parameters;
mod matcher;
mod names;
mod part;
mod plan;
mod prepared;
mod relora_checkpoint;
mod replace;
mod result;
mod rounding;
mod row_arithmetic;
pub(crate) mod sidecar_files;
mod stream;

pub use dtype_advice::DtypeAdvice;
pub use estimate::Estimate;
pub use result::{Action, AdapterUse, MergeReport, OutputFile, Retention, TensorResult, Totals};
pub use rounding::Rounding;

use crate::{
    adapter::Adapter,
    checkpoint::{Checkpoint, Dtype, Writer, dtype, roundings},
    collective::Job,
    error::{Error, Result},
    inputs::Inputs,
    job_array::ArrayTask,
    ops::{CudaOptions, Products},
    progress::Progress,
    staged::{Holds, StagedDir, Target},
};
use device::Gpu;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What Hugging Face writes by default, in bytes.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// A tensor that keeps less than this share of its delta is warned about.
pub const MIN_RETENTION: f64 = 0.9;

/// What to merge, and into what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The checkpoint that updates are added to.
    pub base: PathBuf,
    /// Adapters and their weights, in the order they are added.
    pub adapters: Vec<(PathBuf, f64)>,
    /// The folder to create.
    pub output: PathBuf,
    /// What the beginnings of the adapters' names become, FROM -> TO; the first that fits decides.
    pub map: Vec<(String, String)>,
    /// Element type of every floating point tensor of the output; `None` keeps the base's.
    pub dtype: Option<Dtype>,
    /// How values are rounded to the output's type.
    pub rounding: Rounding,
    /// Bytes of data after which a new shard begins.
    pub max_shard_size: u64,
    /// Replace the output if it exists.
    pub force: bool,
    /// Plan and check, but write nothing.
    pub dry_run: bool,
    /// The GPU that takes the products that are worth it; all on the CPU if none.
    pub gpu: Option<CudaOptions>,
}

impl Options {
    /// The output, checked against everything that is read.
    fn target(&self) -> Result<Target> {
        Target::folder(&self.output, Holds::Checkpoint, self.force, &self.inputs())
    }

    fn inputs(&self) -> Inputs {
        Inputs::of(std::iter::once(&self.base).chain(self.adapters.iter().map(|(path, _)| path)))
    }
}

/// Merges. On success the output folder is complete; on an error, or when interrupted, nothing is left behind.
pub fn run(options: &Options, progress: &Progress) -> Result<MergeReport> {
    let target = if options.dry_run { None } else { Some(options.target()?) };
    let base = Checkpoint::open(&options.base)?;
    let adapters = open_adapters(&options.adapters)?;
    let plan = matcher::plan(&base, &adapters, options.dtype, &options.map)?;
    plan.warnings.iter().for_each(|w| progress.warn(w));
    let gpu = open_gpu(options, progress)?;
    let Some(target) = target else {
        let specs = plan.specs();
        let files = Writer::files(&specs, options.max_shard_size);
        let mut report = result::report(options, &plan, gpu.as_ref(), &files, &[]);
        report.estimate = Some(Estimate::new(&plan, options.rounding, gpu.as_ref())?);
        return Ok(report);
    };
    let staged = StagedDir::create(target)?;
    if let Some(folder) = base.folder() {
        sidecar_files::copy(folder, staged.path(), &plan.config)?;
    }
    let specs = plan.specs();
    let writer = Writer::create(staged.path(), &specs, options.max_shard_size, &metadata(options, &base, &plan)?)?;
    let measured = stream::run(&plan, options.rounding, gpu.as_ref(), &writer, progress)?;
    let files = Writer::files(&specs, options.max_shard_size);
    let mut report = result::report(options, &plan, gpu.as_ref(), &files, &measured);
    explain_losses(&mut report, &plan, progress)?;
    writer.finish()?;
    staged.commit()?;
    Ok(report)
}

/// Merges one job's share of the output's files into `OUT.parts/I-of-N/`, which is complete or absent. The report covers
/// the tensors of these files. [`combine`] makes the output when all jobs are done.
pub fn run_shard(options: &Options, shard: ArrayTask, progress: &Progress) -> Result<MergeReport> {
    options.target()?;
    let base = Checkpoint::open(&options.base)?;
    let adapters = open_adapters(&options.adapters)?;
    let plan = matcher::plan(&base, &adapters, options.dtype, &options.map)?;
    plan.warnings.iter().for_each(|w| progress.warn(w));
    part::warn_of_few_files(&plan, options, shard.count, progress);
    let gpu = open_gpu(options, progress)?;
    part::run(shard, &part::folder(options, part::ARRAY), options, (&base, &adapters), plan, gpu.as_ref(), progress)
}

/// Makes the output of all parts that [`run_shard`] wrote with the same options: the bytes that [`run`] writes.
pub fn combine(options: &Options, progress: &Progress) -> Result<MergeReport> {
    options.target()?;
    let base = Checkpoint::open(&options.base)?;
    let adapters = open_adapters(&options.adapters)?;
    let plan = matcher::plan(&base, &adapters, options.dtype, &options.map)?;
    part::combine(&part::folder(options, part::ARRAY), options, (&base, &adapters), &plan, progress)
}

/// [`run`] in several processes, which see the output's folder under the same path: each writes its share of the files, and
/// the first makes the output of them. The others get no report.
pub fn run_together(options: &Options, job: &Job, progress: &Progress) -> Result<Option<MergeReport>> {
    let parts = part::folder(options, part::RANKS);
    if job.is_leader() {
        if options.dry_run {
            return run(options, progress).map(Some);
        }
        options.target()?;
        // Of processes that died.
        part::remove(&parts)?;
    } else if options.dry_run {
        return Ok(None);
    }
    job.gather(&[])?;
    let whole = write_together(&parts, options, job, progress);
    if job.is_leader() && whole.is_err() {
        // What others have written by now is of no use.
        let _ = part::remove(&parts);
    }
    whole
}

fn write_together(parts: &Path, options: &Options, job: &Job, progress: &Progress) -> Result<Option<MergeReport>> {
    let base = Checkpoint::open(&options.base)?;
    let adapters = open_adapters(&options.adapters)?;
    let plan = || matcher::plan(&base, &adapters, options.dtype, &options.map);
    let own = plan()?;
    own.warnings.iter().for_each(|w| progress.warn(w));
    let gpu = open_gpu(options, progress)?;
    let ranks = job.ranks();
    let shard = ArrayTask { index: ranks.rank + 1, count: ranks.world_size };
    part::warn_of_few_files(&own, options, shard.count, progress);
    part::run(shard, parts, options, (&base, &adapters), own, gpu.as_ref(), &progress.bars_only())?;
    job.gather(&[])?;
    if !job.is_leader() {
        return Ok(None);
    }
    part::combine(parts, options, (&base, &adapters), &plan()?, progress).map(Some)
}

fn open_gpu(options: &Options, progress: &Progress) -> Result<Option<Gpu>> {
    let Some(gpu) = options.gpu.as_ref().map(Products::open).transpose()? else { return Ok(None) };
    progress.detail(&format!("device {} is {}", gpu.name(), gpu.model()));
    Ok(Some(Gpu::new(gpu)))
}

fn open_adapters(paths: &[(PathBuf, f64)]) -> Result<Vec<(Adapter, f64)>> {
    let open = |(path, weight): &(PathBuf, f64)| {
        if !weight.is_finite() || *weight == 0.0 {
            return Err(Error::request(format!(
                "adapter '{}' has weight {weight}, expected a finite number other than 0",
                path.display()
            )));
        }
        Ok((Adapter::open(path)?, *weight))
    };
    paths.iter().map(open).collect()
}

/// What the output's files say of themselves: where they come from, and how their weights were rounded.
fn metadata(options: &Options, base: &Checkpoint, plan: &plan::Plan) -> Result<BTreeMap<String, String>> {
    let mut metadata = origin(options);
    let (kind, seed) = match options.rounding {
        Rounding::Nearest => (roundings::Kind::Nearest, None),
        Rounding::Stochastic { seed } => (roundings::Kind::Stochastic, Some(seed)),
    };
    // Of several types, the one with the fewest bits.
    let changed = plan.outputs.iter().filter(|o| !o.is_copy()).map(|o| o.spec.dtype);
    let coarsest =
        changed.filter(|d| dtype::is_float(*d)).max_by(|a, b| dtype::ulp(*a, 1.0).total_cmp(&dtype::ulp(*b, 1.0)));
    metadata.extend(roundings::metadata(&roundings::after_merge(base, kind, seed, coarsest)?));
    Ok(metadata)
}

/// `format: pt` is what `transformers` insists on; the rest says where the file came from.
fn origin(options: &Options) -> BTreeMap<String, String> {
    let name = |path: &Path| path.display().to_string();
    let adapters: Vec<String> = options.adapters.iter().map(|(p, w)| format!("{}={w}", name(p))).collect();
    let rounding = match options.rounding {
        Rounding::Nearest => "nearest".to_owned(),
        Rounding::Stochastic { seed } => format!("stochastic, seed {seed}"),
    };
    BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("rounding".to_owned(), rounding),
        ("merged_by".to_owned(), concat!("relora-kit ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("base".to_owned(), name(&options.base)),
        ("adapters".to_owned(), adapters.join(", ")),
    ])
}

/// Names the worst of the tensors that lose more than allowed, and what would keep its delta.
fn explain_losses(report: &mut MergeReport, plan: &plan::Plan, progress: &Progress) -> Result<()> {
    let lossy: Vec<_> = report.tensors.iter().filter(|t| t.loses_more_than_allowed()).collect();
    let Some(worst) = lossy.iter().min_by(|a, b| a.kept().total_cmp(&b.kept())) else { return Ok(()) };
    let output = plan.outputs.iter().find(|o| o.spec.name == worst.name);
    let remedy = output.map(dtype_advice::find).transpose()?.flatten();
    let advice = remedy.as_ref().map_or_else(String::new, |r| {
        let dtype = format!("{:?}", r.dtype).to_lowercase();
        let kept = 100.0 * r.retention.retention;
        let by_chance = match report.rounding {
            Rounding::Nearest => "; --rounding stochastic keeps all of it on average, with a larger error",
            Rounding::Stochastic { .. } => "",
        };
        format!("; --dtype {dtype} would keep {kept:.1}% of it{by_chance}")
    });
    progress.warn(&format!(
        "{} of {} changed tensors lose more than {:.0}% of their delta to rounding; worst: '{}' keeps {:.1}% in {:?}{advice}",
        lossy.len(),
        report.tensors.len(),
        100.0 * (1.0 - MIN_RETENTION),
        worst.name,
        100.0 * worst.kept(),
        worst.dtype
    ));
    report.remedy = remedy;
    Ok(())
}
