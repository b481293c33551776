//! Singular values of weight updates, what they say about rank, and what rounding alone could have faked.
//!
//! `run` opens the sources, checks that they fit, chooses the matrices, computes their singular values (largest
//! matrices first, one per thread) and judges the gates. With a [part](Options::part) it measures one part of the
//! matrices of a job array, and [`join`] makes the whole of all parts.

pub mod against;
mod complete;
pub mod cycles;
pub mod factored;
mod factors;
pub mod gates;
mod gram;
pub mod groups;
mod judge;
mod lapack;
mod measure;
pub mod measures;
mod names;
pub mod noise;
mod pair;
pub mod parts;
mod run;
mod sources;
pub mod svd;
mod task;

pub use against::Against;
pub use cycles::CycleSummary;
pub use gates::{Gate, GateResult};
pub use groups::Group;
pub use measures::Measures;
pub use parts::{Part, join};
pub use run::{run, run_together};
pub use sources::{Labelled, SourceSpec};
pub use svd::Method;

use crate::{job_array::ArrayTask, ops::CudaOptions};
use noise::known::Roundings;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// What to measure and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the updates come from.
    pub sources: Vec<SourceSpec>,
    /// Globs over tensor names; a tensor is taken if any matches, or if there are none.
    pub filter: Vec<String>,
    /// Gates to judge.
    pub gates: Vec<Gate>,
    /// Replaces `max(m, n) * eps(f32)` as the numerical tolerance relative to `s1`.
    pub rank_tolerance: Option<f64>,
    /// How often each weight was rounded between base and tuned; 0 for exact storage. If none is given, what the files say.
    pub roundings: Option<u64>,
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
    /// Measure one part of the matrices, for [`join`], which judges the gates and looks at `against`.
    pub part: Option<ArrayTask>,
}

/// The result of `run`; its serialisation is the JSON of the command.
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
    /// Comparison with an earlier result, with [`against`](Options::against).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
    /// Set where this is one part of the matrices only.
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
    /// File -> sha256 of its content, with [`hashes`](Options::hashes).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
    /// How often its weights were rounded, which the noise edges follow from; absent for an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roundings: Option<Roundings>,
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
    /// What computed the singular values, where a GPU was named: `cuda:N`, or `cpu` for what is not worth its while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// All singular values, largest first, with [`sigma`](Options::sigma).
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
    /// Whether it is a weight whose update is unknown: a gate that covers it counts it as not satisfying.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub weight: bool,
}

/// Why a tensor was not measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its shape has not two extents.
    NotAMatrix,
    /// It holds integers, booleans or packed numbers.
    NotFloatingPoint,
    /// It holds floating-point numbers of a type that is not read.
    UnreadableType,
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
