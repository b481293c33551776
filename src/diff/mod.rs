//! How two checkpoints differ: names, shapes, types, and the values of every tensor that both have.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod compare;
mod sums;

pub use compare::Difference;

use self::sums::Tolerance;
use crate::{
    adapter,
    checkpoint::{Checkpoint, Dtype, Filter, Tensor, dtype, natural_key},
    error::{Error, Result},
    progress::Progress,
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What to compare, and what counts as equal: `|a - b| <= atol + rtol * |b|`.
#[derive(Clone, Debug)]
pub struct Options {
    /// A checkpoint (folder or file), or an adapter folder.
    pub a: PathBuf,
    /// What it is compared with.
    pub b: PathBuf,
    /// Which tensors.
    pub filter: Filter,
    /// Absolute tolerance.
    pub atol: f64,
    /// Tolerance relative to the value in `b`.
    pub rtol: f64,
}

/// The result of `diff`.
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    /// Version of this layout.
    pub schema: u32,
    /// The first checkpoint.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub a: PathBuf,
    /// The second.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub b: PathBuf,
    /// Absolute tolerance.
    pub atol: f64,
    /// Relative tolerance.
    pub rtol: f64,
    /// Whether every tensor is on both sides, with one shape, and all values agree within the tolerance.
    pub equal: bool,
    /// Every tensor of both, in reading order.
    pub tensors: Vec<TensorDiff>,
}

/// One name.
#[derive(Clone, Debug, Serialize)]
pub struct TensorDiff {
    /// Name as stored.
    pub name: String,
    /// What became of it.
    pub status: Status,
    /// Type and shape in `a`, if it is there.
    pub a: Option<Side>,
    /// Type and shape in `b`, if it is there.
    pub b: Option<Side>,
    /// The values, where they could be compared one by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub values: Option<Difference>,
}

/// How one side stores a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
}

/// The verdict on one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The same bytes.
    Identical,
    /// Other bytes (or another type), but every value within the tolerance.
    Close,
    /// Some value is off by more than the tolerance.
    Different,
    /// Two shapes.
    Shape,
    /// Two types that cannot be compared by value.
    Dtype,
    /// Only in `a`.
    OnlyInA,
    /// Only in `b`.
    OnlyInB,
}

impl Status {
    /// Whether the tensor counts as equal.
    pub fn is_equal(self) -> bool {
        matches!(self, Status::Identical | Status::Close)
    }
}

/// Compares headers, then the values of all tensors that both sides have, on all threads.
pub fn run(options: &Options, progress: &Progress) -> Result<Diff> {
    for (flag, x) in [("--atol", options.atol), ("--rtol", options.rtol)] {
        if !(x >= 0.0 && x.is_finite()) {
            return Err(Error::request(format!("{flag} {x} is not a tolerance, expected a finite number from 0")));
        }
    }
    let (a, b) = (open(&options.a)?, open(&options.b)?);
    let mut names: Vec<&str> = a.tensors().map(|t| t.name()).collect();
    names.extend(b.tensors().map(|t| t.name()).filter(|n| a.get(n).is_none()));
    names.retain(|n| options.filter.takes(n));
    if names.is_empty() && !(a.is_empty() && b.is_empty()) {
        return Err(Error::request(format!(
            "no tensor of '{}' or '{}' matches the filter",
            a.path().display(),
            b.path().display()
        ))
        .help("* matches any characters: --filter '*self_attn*'"));
    }
    names.sort_by_cached_key(|n| natural_key(n));
    let pairs: Vec<(Tensor, Tensor)> =
        names.iter().filter_map(|n| Some((a.get(n)?, b.get(n)?))).filter(|(a, b)| comparable(a, b)).collect();
    let tolerance = Tolerance { atol: options.atol, rtol: options.rtol };
    let mut differences = compare::all(&pairs, tolerance, progress)?.into_iter();
    let tensors: Vec<TensorDiff> = names
        .iter()
        .map(|name| {
            let (a, b) = (a.get(name), b.get(name));
            let both = a.zip(b);
            let values = both.filter(|(a, b)| comparable(a, b)).and_then(|_| differences.next());
            let status = match (&values, both) {
                (Some(d), Some((a, b))) => d.status(a.dtype() == b.dtype()),
                (_, Some((a, b))) if a.shape() != b.shape() => Status::Shape,
                (_, Some(_)) => Status::Dtype,
                _ if a.is_some() => Status::OnlyInA,
                _ => Status::OnlyInB,
            };
            let side = |t: Tensor| Side { dtype: t.dtype(), shape: t.shape().to_vec() };
            TensorDiff { name: (*name).to_owned(), status, a: a.map(side), b: b.map(side), values }
        })
        .collect();
    Ok(Diff {
        schema: 1,
        a: options.a.clone(),
        b: options.b.clone(),
        atol: options.atol,
        rtol: options.rtol,
        equal: tensors.iter().all(|t| t.status.is_equal()),
        tensors,
    })
}

/// Floating point of any two types is compared by value, everything else byte by byte.
fn comparable(a: &Tensor, b: &Tensor) -> bool {
    let floats = dtype::is_float(a.dtype()) && dtype::is_float(b.dtype());
    a.shape() == b.shape() && (a.dtype() == b.dtype() || floats)
}

fn open(path: &Path) -> Result<Checkpoint> {
    if adapter::is_adapter(path) {
        return Checkpoint::from_files(path, vec![adapter::open_tensors(path)?]);
    }
    Checkpoint::open(path)
}
