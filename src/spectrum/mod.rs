//! Singular values of weight updates, what they say about rank, and what rounding alone could have faked.
//!
//! [`run`] opens the sources, checks that they fit, chooses the matrices, computes their singular values (largest
//! matrices first, spread over the threads) and judges the gates. With a [shard](Options::shard) it measures one job's
//! share of the matrices, and [`combine`] joins the parts.

pub mod against;
pub mod cycles;
pub mod factored;
pub mod gates;
mod gram;
pub mod groups;
mod lapack;
mod lowrank;
pub mod measures;
mod names;
pub mod noise;
mod pair;
pub mod part;
pub mod schedule;
mod source;
pub mod svd;

pub use against::Against;
pub use cycles::CycleSummary;
pub use gates::{Gate, GateResult};
pub use groups::Group;
pub use measures::Measures;
pub use part::{Part, combine};
pub use source::{Labelled, Request};
pub use svd::Method;

use crate::{
    collective::Job as Processes,
    delta::LowRank,
    error::{Error, Kind, Result},
    ops::{CudaOptions, Solver},
    progress::Progress,
    shard::Shard,
    threads,
};
use gates::{Asked, Candidate};
use lowrank::Factors;
use measures::BELOW;
use noise::UlpSums;
use schedule::Budget;
use serde::{Deserialize, Serialize};
use source::{Job, Opened, Work, skipped};
use std::{collections::BTreeMap, path::PathBuf};
use svd::{SMALL, Sigma, Way};

/// What to measure and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the updates come from.
    pub requests: Vec<Request>,
    /// Globs over tensor names; a tensor is taken if any matches, or if there are none.
    pub filter: Vec<String>,
    /// Gates to judge.
    pub gates: Vec<Gate>,
    /// Replaces `max(m, n) * eps(f32)` as the numerical tolerance relative to `s1`.
    pub rank_tolerance: Option<f64>,
    /// How often each weight was rounded between base and tuned (stored merges).
    pub roundings: u64,
    /// What `r` means in gates over checkpoints.
    pub rank: Option<usize>,
    /// Report matrices with NaN or infinite entries and go on.
    pub skip_nonfinite: bool,
    /// Ignore tensors that only one side has.
    pub common_only: bool,
    /// Keep all singular values in the result.
    pub sigma: bool,
    /// How singular values are computed.
    pub method: Method,
    /// Up to this `min(m, n)` the SVD is taken, which is always computed on the CPU ([`svd::SMALL`] if not given).
    pub small: Option<usize>,
    /// The GPU that takes the Gram matrices; everything on the CPU if none.
    pub gpu: Option<CudaOptions>,
    /// Hash the files of the sources.
    pub hashes: bool,
    /// An earlier result, as JSON, to compare with.
    pub against: Option<PathBuf>,
    /// Measure one job's share of the matrices: the result is a part for [`combine`]. Gates and `against` are for then.
    pub shard: Option<Shard>,
}

/// The result of [`run`]; its serialisation is the JSON of the command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// Version of this layout.
    pub schema: u32,
    /// Where the updates come from.
    pub sources: Vec<Source>,
    /// One entry per matrix and source.
    pub matrices: Vec<Matrix>,
    /// Summaries per source and module kind.
    pub groups: Vec<Group>,
    /// Verdicts, one per gate and source.
    pub gates: Vec<GateResult>,
    /// Tensors that were not measured, and why.
    pub skipped: Vec<Skipped>,
    /// How the rank grows, one entry per cycle of each run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cycles: Vec<CycleSummary>,
    /// Comparison with an earlier result, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
    /// Set where this is one job's share of the matrices only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
}

/// One labelled source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// How the matrices of this source are marked.
    pub label: String,
    /// `checkpoints`, `adapter` or `run`.
    pub kind: String,
    /// W0, for checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "crate::escape::lossy_option")]
    pub base: Option<PathBuf>,
    /// The tuned checkpoint, the adapter or the run.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub path: PathBuf,
    /// Number of finished cycles, for runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycles: Option<u64>,
    /// File -> sha256 of its content, if asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
}

/// The measures of one update of one weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Matrix {
    /// Tensor name in the base.
    pub name: String,
    /// Source.
    pub label: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Stored type of the tuned weight, or of the factors.
    pub dtype: String,
    /// Module kind: `q_proj`, `down_proj`, ...
    pub module: String,
    /// Layer number, where the name has one.
    pub layer: Option<usize>,
    /// Rank of the adapter, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    /// The cycle, for runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle: Option<u64>,
    /// For runs: whether this is the sum of the cycles up to this one, or the cycle alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cumulative: Option<bool>,
    /// The metrics, flat.
    #[serde(flatten)]
    pub measures: Measures,
    /// What computed the singular values, where a GPU was asked for: `cuda:N`, or `cpu` for what is not worth its while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// All singular values, largest first, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma: Option<Vec<f64>>,
}

/// A tensor that was not measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    /// Tensor.
    pub name: String,
    /// Source.
    pub label: String,
    /// Why.
    pub reason: Reason,
    /// The reason in words.
    pub detail: String,
}

/// Why a tensor was not measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its shape has not two extents.
    NotAMatrix,
    /// It holds integers, booleans or packed numbers.
    NotFloatingPoint,
    /// Only one side has it.
    OneSideOnly,
    /// Its difference holds NaN or infinity.
    NonFinite,
    /// An adapter stores it in full, not as factors.
    NotLowRank,
}

impl Spectrum {
    /// Whether every gate held.
    pub fn passed(&self) -> bool {
        self.gates.iter().all(|g| g.passed)
    }

    /// Drops the singular values themselves.
    pub fn forget_sigma(&mut self) {
        self.matrices.iter_mut().for_each(|m| m.sigma = None);
    }

    /// The whole update of every weight: for runs, the sum of all cycles. Gates and groups look at these.
    pub fn totals(&self) -> impl Iterator<Item = &Matrix> {
        totals(&self.sources, &self.matrices)
    }
}

fn totals<'a>(sources: &'a [Source], matrices: &'a [Matrix]) -> impl Iterator<Item = &'a Matrix> {
    let last = |label: &str| sources.iter().find(|s| s.label == label).and_then(|s| s.cycles);
    matrices.iter().filter(move |m| m.cycle.is_none() || m.cumulative == Some(true) && m.cycle == last(&m.label))
}

/// What is to be measured: the sources fit, and every gate asks about something.
struct Prepared<'a> {
    opened: &'a [Opened],
    jobs: Vec<Job<'a>>,
    skipped: Vec<Skipped>,
    gpu: Option<Solver>,
}

fn open(options: &Options) -> Result<Vec<Opened>> {
    check_labels(options)?;
    options.requests.iter().map(Opened::open).collect()
}

impl<'a> Prepared<'a> {
    fn new(opened: &'a [Opened], options: &Options, progress: &Progress) -> Result<Prepared<'a>> {
        let (mut jobs, mut skipped) = (Vec::new(), Vec::new());
        for source in opened {
            source.plan(options, &mut jobs, &mut skipped)?;
        }
        let asked: Vec<Asked> =
            jobs.iter().map(|j| Asked { label: &j.label, name: &j.name, ranked: j.r.is_some() }).collect();
        check_gates(&options.gates, options.requests.iter().map(Request::label), &asked)?;
        if jobs.is_empty() {
            return Err(nothing_to_measure(options, &skipped));
        }
        let gpu = options.gpu.as_ref().map(Solver::open).transpose()?;
        if let Some(gpu) = &gpu {
            progress.detail(&format!("device {} is {}", gpu.name(), gpu.model()));
        }
        Ok(Prepared { opened, jobs, skipped, gpu })
    }

    fn way(&self, options: &Options) -> Way<'_> {
        Way { method: options.method, small: options.small.unwrap_or(SMALL), gpu: self.gpu.as_ref() }
    }
}

/// Measures every matrix of every source, or one job's share of them.
pub fn run(options: &Options, progress: &Progress) -> Result<Spectrum> {
    let before = options.against.as_deref().map(against::read).transpose()?;
    let opened = open(options)?;
    let mut prepared = Prepared::new(&opened, options, progress)?;
    if let Some(shard) = options.shard {
        if !options.gates.is_empty() || options.against.is_some() {
            return Err(Error::request(format!("gates and earlier results need all parts, but this is part {shard}"))
                .help("pass them when the parts are combined"));
        }
        return run_shard(shard, options, prepared, progress);
    }
    let (mut matrices, mut skipped) = (Vec::new(), std::mem::take(&mut prepared.skipped));
    let (way, own): (Way, Vec<&Job>) = (prepared.way(options), prepared.jobs.iter().collect());
    for measured in measure_all(&own, prepared.jobs.len(), options, way, progress)? {
        match measured {
            Measured::Matrices(found) => matrices.extend(found),
            Measured::Skipped(skip) => skipped.push(skip),
        }
    }
    let sources = opened.iter().map(|o| o.describe(|_| options.hashes)).collect::<Result<Vec<_>>>()?;
    complete(options, sources, matrices, skipped, before)
}

/// [`run`] in several processes: each measures its share, and the first joins them. The others get nothing.
pub fn run_together(options: &Options, job: &Processes, progress: &Progress) -> Result<Option<Spectrum>> {
    // Read again when the parts are joined: here it only says early what is wrong with it.
    options.against.as_deref().map(against::read).transpose()?;
    let opened = open(options)?;
    let prepared = Prepared::new(&opened, options, progress)?;
    let ranks = job.ranks();
    let shard = Shard { index: ranks.rank + 1, count: ranks.world_size };
    // The sums that decide are those of the whole.
    let own = Options { gates: Vec::new(), against: None, ..options.clone() };
    let part = run_shard(shard, &own, prepared, progress)?;
    let json = serde_json::to_vec(&part).map_err(|e| Error::environment(e.to_string()))?;
    let parts = job.collect(&json)?;
    if !job.is_leader() {
        return Ok(None);
    }
    let parts = parts.into_iter().enumerate().map(|(rank, json)| (PathBuf::from(job.name(rank)), json)).collect();
    part::join(parts, options).map(Some)
}

/// Measures this job's share. The part holds all singular values, and this job hashes its share of the files: combining may
/// ask for both.
fn run_shard(shard: Shard, options: &Options, mut prepared: Prepared, progress: &Progress) -> Result<Spectrum> {
    let options = &Options { sigma: true, ..options.clone() };
    let mut skipped = std::mem::take(&mut prepared.skipped);
    let (way, jobs, opened) = (prepared.way(options), &prepared.jobs, prepared.opened);
    let costs: Vec<f64> = jobs.iter().map(|j| j.need(way).cost).collect();
    let (places, own): (Vec<usize>, Vec<&Job>) = shard
        .own(&costs)
        .into_iter()
        .zip(jobs)
        .enumerate()
        .filter(|(_, (own, _))| *own)
        .map(|(i, (_, j))| (i, j))
        .unzip();
    let mut part = Part::new(shard, options, opened, jobs.len())?;
    part.skipped_by_all = skipped.len();
    let mut matrices = Vec::new();
    for (place, measured) in places.into_iter().zip(measure_all(&own, jobs.len(), options, way, progress)?) {
        let found = match measured {
            Measured::Matrices(found) => found,
            Measured::Skipped(skip) => {
                skipped.push(skip);
                Vec::new()
            }
        };
        part.measured.push(part::Measured::new(place, &found));
        matrices.extend(found);
    }
    let hashed = part::own_files(shard, opened)?;
    let sources = opened.iter().map(|o| o.describe(|file| hashed.contains(file))).collect::<Result<Vec<_>>>()?;
    let mut spectrum = Spectrum { part: Some(part), ..complete(options, sources, matrices, skipped, None)? };
    spectrum.forget_sigma();
    Ok(spectrum)
}

/// Measures `jobs`, a share of `of` jobs, and warns about what cannot be measured.
fn measure_all(jobs: &[&Job], of: usize, options: &Options, way: Way, progress: &Progress) -> Result<Vec<Measured>> {
    let bar = progress.count("singular values", jobs.len() as u64);
    let need = |j: &&Job| j.need(way);
    let budget = Budget { memory: memory_budget(jobs), gpu_memory: gpu_budget(way)? };
    let run = || schedule::run(jobs, budget, need, |j| measure(j, options, way), |_| bar.inc(1));
    // One thread per matrix as soon as the whole has several: the bytes do not depend on how it is shared out.
    let results = if of > 1 { threads::with_serial_blas(run) } else { run() };
    bar.finish_and_clear();
    let results = results?;
    for result in &results {
        if let Measured::Skipped(skip) = result {
            progress.warn(&format!("{} ('{}') is not measured: {}", skip.name, skip.label, skip.detail));
        }
    }
    Ok(results)
}

/// Judges the gates and summarises.
fn complete(
    options: &Options,
    sources: Vec<Source>,
    matrices: Vec<Matrix>,
    skipped: Vec<Skipped>,
    before: Option<Spectrum>,
) -> Result<Spectrum> {
    let gates = judge(&options.gates, &sources, &matrices)?;
    let groups = groups::groups(totals(&sources, &matrices));
    let cycles = cycles::summarise(&matrices);
    let mut spectrum =
        Spectrum { schema: 1, groups, sources, matrices, gates, skipped, cycles, against: None, part: None };
    if let (Some(path), Some(before)) = (&options.against, before) {
        spectrum.against = Some(against::compare(path, &before, &spectrum));
    }
    Ok(spectrum)
}

fn check_labels(options: &Options) -> Result<()> {
    let labels: Vec<&str> = options.requests.iter().map(Request::label).collect();
    match labels.iter().enumerate().find(|(i, label)| labels[..*i].contains(label)) {
        None => Ok(()),
        Some((_, label)) => {
            Err(Error::request(format!("two sources are called '{label}'"))
                .help("give each a name of its own: LABEL=PATH"))
        }
    }
}

/// Bytes that matrices in flight may hold together: with what else a process needs, below 6 of the largest in f64.
fn memory_budget(jobs: &[&Job]) -> f64 {
    5.5 * jobs.iter().map(|j| 8.0 * j.shape.0 as f64 * j.shape.1 as f64).fold(0.0, f64::max)
}

/// The same for a GPU: most of what is free when measuring begins.
fn gpu_budget(way: Way) -> Result<f64> {
    way.gpu.map_or(Ok(0.0), |gpu| Ok(0.9 * gpu.free_memory()? as f64))
}

/// Every gate must ask about at least one matrix of each source, and know its rank if it compares with it.
fn check_gates<'a>(gates: &[Gate], labels: impl Iterator<Item = &'a str> + Clone, all: &[Asked]) -> Result<()> {
    for gate in gates {
        for label in labels.clone() {
            let mut asked = all.iter().filter(|a| a.label == label && gate.covers(a.name)).peekable();
            if asked.peek().is_none() {
                return Err(gate.no_match(label));
            }
            if gate.needs_rank() && asked.any(|a| !a.ranked) {
                return Err(gate.no_rank(label));
            }
        }
    }
    Ok(())
}

fn judge(gates: &[Gate], sources: &[Source], matrices: &[Matrix]) -> Result<Vec<GateResult>> {
    let mut results = Vec::new();
    for gate in gates {
        for label in sources.iter().map(|s| s.label.as_str()) {
            let of_label = totals(sources, matrices).filter(|m| m.label == label);
            let candidates: Vec<Candidate> =
                of_label.map(|m| Candidate { label, name: &m.name, r: m.r, measures: &m.measures }).collect();
            results.push(gate.judge(label, &candidates)?);
        }
    }
    Ok(results)
}

fn nothing_to_measure(options: &Options, skipped: &[Skipped]) -> Error {
    let why = if skipped.is_empty() { String::new() } else { format!(" ({} tensors are no matrices)", skipped.len()) };
    let error = Error::request(format!("there is no matrix to measure{why}"));
    if options.filter.is_empty() {
        error
    } else {
        error.help("--filter may be too narrow: it matches whole tensor names")
    }
}

enum Measured {
    Matrices(Vec<Matrix>),
    Skipped(Skipped),
}

fn measure(job: &Job, options: &Options, way: Way) -> Result<Measured> {
    match &job.work {
        Work::Pair { pair, roundings } => {
            let mut ulps = UlpSums::new(pair.shape.0, pair.shape.1);
            let tolerance = tolerance(job, options);
            let block = |rows, columns, out: &mut [f64]| pair.block(rows, columns, out, &mut ulps);
            match svd::streamed(pair.shape, way, tolerance, BELOW, block)? {
                Ok(sigma) => {
                    let edge = ulps.noise_edge(*roundings);
                    Ok(Measured::Matrices(vec![matrix(job, options, None, sigma, edge)]))
                }
                Err(found) => non_finite(job, options, found.describe(pair)),
            }
        }
        Work::Factors(factors) => match factors.read() {
            Ok(deltas) => Ok(Measured::Matrices(measure_factors(job, options, way, factors, &deltas)?)),
            Err(e) if e.kind == Kind::Request => non_finite(job, options, e.message),
            Err(e) => Err(e),
        },
    }
}

fn measure_factors(
    job: &Job,
    options: &Options,
    way: Way,
    factors: &Factors,
    deltas: &[LowRank<f64>],
) -> Result<Vec<Matrix>> {
    let values = factored::singular_values(deltas, way, tolerance(job, options))?;
    let Some(cycles) = &job.cycles else {
        return Ok(values.into_iter().map(|v| matrix(job, options, None, v.own, 0.0)).collect());
    };
    let ulps = factors.ulps()?;
    let mut matrices = Vec::new();
    for (count, (&cycle, v)) in (1..).zip(cycles.iter().zip(values)) {
        matrices.push(matrix(job, options, Some((cycle, false)), v.own, ulps.noise_edge(1)));
        matrices.push(matrix(job, options, Some((cycle, true)), v.cumulative, ulps.noise_edge(count)));
    }
    Ok(matrices)
}

fn tolerance(job: &Job, options: &Options) -> f64 {
    options.rank_tolerance.unwrap_or_else(|| measures::default_tolerance(job.shape))
}

fn matrix(job: &Job, options: &Options, cycle: Option<(u64, bool)>, sigma: Sigma, noise_edge: f64) -> Matrix {
    let measures = Measures::new(&sigma.values, job.shape, tolerance(job, options), noise_edge);
    Matrix {
        name: job.name.clone(),
        label: job.label.clone(),
        shape: [job.shape.0, job.shape.1],
        dtype: format!("{:?}", job.dtype),
        module: job.place.module.clone(),
        layer: job.place.layer,
        r: job.r,
        cycle: cycle.map(|c| c.0),
        cumulative: cycle.map(|c| c.1),
        measures,
        device: options.gpu.as_ref().map(|gpu| match sigma.on_gpu {
            true => format!("cuda:{}", gpu.ordinal),
            false => "cpu".to_owned(),
        }),
        sigma: options.sigma.then_some(sigma.values),
    }
}

fn non_finite(job: &Job, options: &Options, what: String) -> Result<Measured> {
    if options.skip_nonfinite {
        return Ok(Measured::Skipped(skipped(&job.name, &job.label, Reason::NonFinite, what)));
    }
    Err(Error::request(format!("tensor '{}' of source '{}': {what}", job.name, job.label))
        .help("pass --skip-nonfinite to report it and go on"))
}
