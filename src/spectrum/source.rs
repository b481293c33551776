//! Sources of updates: opens them, checks that they fit, and lists the matrices to measure.

use super::{
    Matrix, Measures, Options, Reason, Skipped, Source, names,
    pair::{NonFinite, Pair},
};
use crate::{
    checkpoint::{Checkpoint, Dtype, Tensor, dtype},
    error::{Error, Result},
};
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::path::{Path, PathBuf};

/// A path and the name its results go by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// Unique among the sources.
    pub label: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Labelled {
    /// Reads `[LABEL=]PATH`. A path that exists as written is a path even if it holds `=`; without a label the last
    /// component of the path is taken.
    pub fn parse(text: &str) -> Labelled {
        match text.split_once('=') {
            Some((label, path)) if !label.is_empty() && !Path::new(text).exists() => {
                Labelled { label: label.to_owned(), path: path.into() }
            }
            _ => {
                let path = PathBuf::from(text);
                let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
                let last = whole.file_name().unwrap_or(whole.as_os_str());
                Labelled { label: last.to_string_lossy().into_owned(), path }
            }
        }
    }
}

/// One source as asked for.
#[derive(Clone, Debug)]
pub enum Request {
    /// `tuned - base`, two checkpoints.
    Checkpoints {
        /// W0.
        base: PathBuf,
        /// Wn.
        tuned: Labelled,
    },
}

impl Request {
    /// The label of its results.
    pub fn label(&self) -> &str {
        match self {
            Request::Checkpoints { tuned, .. } => &tuned.label,
        }
    }
}

/// A source whose files are mapped.
pub(super) enum Opened {
    Checkpoints { request: Request, base: Checkpoint, tuned: Checkpoint },
}

/// One matrix to measure.
pub(super) struct Job<'a> {
    pub label: String,
    pub name: String,
    pub place: names::Place,
    pub shape: (usize, usize),
    pub dtype: Dtype,
    pub r: Option<usize>,
    pub work: Work<'a>,
}

/// How the singular values are found.
pub(super) enum Work<'a> {
    Pair { pair: Pair<'a>, roundings: u64 },
}

impl Job<'_> {
    /// Proportional to the work: the cube that the eigenvalues take plus the product that comes before.
    pub fn cost(&self) -> f64 {
        let (short, long) = (self.shape.0.min(self.shape.1) as f64, self.shape.0.max(self.shape.1) as f64);
        short * short * (short + long)
    }

    pub fn matrix(&self, measures: Measures, sigma: Option<Vec<f64>>) -> Matrix {
        Matrix {
            name: self.name.clone(),
            label: self.label.clone(),
            shape: [self.shape.0, self.shape.1],
            dtype: format!("{:?}", self.dtype),
            module: self.place.module.clone(),
            layer: self.place.layer,
            r: self.r,
            measures,
            sigma,
        }
    }

    pub fn skip(&self, pair: &Pair, found: NonFinite) -> Skipped {
        skipped(&self.name, &self.label, Reason::NonFinite, super::non_finite(pair, found))
    }
}

fn skipped(name: &str, label: &str, reason: Reason, detail: String) -> Skipped {
    Skipped { name: name.to_owned(), label: label.to_owned(), reason, detail }
}

impl Opened {
    pub fn open(request: &Request) -> Result<Opened> {
        match request {
            Request::Checkpoints { base, tuned } => Ok(Opened::Checkpoints {
                request: request.clone(),
                base: Checkpoint::open(base)?,
                tuned: Checkpoint::open(&tuned.path)?,
            }),
        }
    }

    pub fn describe(&self) -> Source {
        match self {
            Opened::Checkpoints { request, base, tuned } => Source {
                label: request.label().to_owned(),
                kind: "checkpoints".into(),
                base: Some(base.path().to_owned()),
                path: tuned.path().to_owned(),
            },
        }
    }

    /// Adds this source's matrices to `jobs`, and what is none to `skipped`.
    pub fn plan<'a>(&'a self, options: &Options, jobs: &mut Vec<Job<'a>>, skipped: &mut Vec<Skipped>) -> Result<()> {
        let filter = Filter::new(&options.filter)?;
        match self {
            Opened::Checkpoints { request, base, tuned } => {
                plan_pairs(request.label(), base, tuned, &filter, options, jobs, skipped)
            }
        }
    }
}

fn plan_pairs<'a>(
    label: &str,
    base: &'a Checkpoint,
    tuned: &'a Checkpoint,
    filter: &Filter,
    options: &Options,
    jobs: &mut Vec<Job<'a>>,
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
        match what_it_is_not(&before).or(what_it_is_not(&after)) {
            Some((reason, detail)) => skip.push(skipped(before.name(), label, reason, detail)),
            None => pairs.push(Pair { base: before, tuned: after, shape: before.matrix_shape()? }),
        }
    }
    // In the order of the base's names, so that layers come in reading order whatever the shards.
    pairs.sort_by_cached_key(|p| natural_key(p.tuned.name()));
    let places = names::places(pairs.iter().map(|p| p.tuned.name()));
    jobs.extend(pairs.iter().zip(places).map(|(&pair, place)| Job {
        label: label.to_owned(),
        name: pair.tuned.name().to_owned(),
        place,
        shape: pair.shape,
        dtype: pair.tuned.dtype(),
        r: options.rank,
        work: Work::Pair { pair, roundings: options.roundings.max(1) },
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
            lonely.push((tensor.name(), here.path()));
        }
    }
    if !common_only && let Some((first, side)) = lonely.first() {
        let list: Vec<String> =
            lonely.iter().take(10).map(|(name, side)| format!("\n  {name} (only in '{}')", side.display())).collect();
        let more = if lonely.len() > 10 { format!("\n  and {} more", lonely.len() - 10) } else { String::new() };
        return Err(Error::request(format!(
            "source '{label}': {} tensors are on one side only, first '{first}' in '{}'{}{more}",
            lonely.len(),
            side.display(),
            list.concat(),
        ))
        .help("pass --common-only to measure the others, or --filter to choose"));
    }
    for (name, side) in lonely {
        skip.push(skipped(name, label, Reason::OneSideOnly, format!("only in '{}'", side.display())));
    }
    Ok(())
}

fn what_it_is_not(tensor: &Tensor) -> Option<(Reason, String)> {
    if tensor.shape().len() != 2 {
        Some((Reason::NotAMatrix, format!("its shape is {:?}", tensor.shape())))
    } else if !dtype::is_float(tensor.dtype()) {
        Some((Reason::NotFloatingPoint, format!("its type is {:?}", tensor.dtype())))
    } else {
        None
    }
}

/// Sorts `layers.10` after `layers.9`.
pub(super) fn natural_key(name: &str) -> Vec<(u64, String)> {
    let part = |p: &str| p.parse::<u64>().map_or((0, p.to_owned()), |n| (n + 1, String::new()));
    name.split('.').map(part).collect()
}

/// Globs over tensor names.
pub(super) struct Filter(Option<GlobSet>);

impl Filter {
    pub fn new(globs: &[String]) -> Result<Filter> {
        if globs.is_empty() {
            return Ok(Filter(None));
        }
        let mut set = GlobSetBuilder::new();
        for glob in globs {
            set.add(
                Glob::new(glob)
                    .map_err(|e| Error::request(format!("--filter '{glob}' is not a glob: {}", e.kind())))?,
            );
        }
        let set = set.build().map_err(|e| Error::request(format!("--filter: {e}")))?;
        Ok(Filter(Some(set)))
    }

    pub fn takes(&self, name: &str) -> bool {
        self.0.as_ref().is_none_or(|set| set.is_match(name))
    }
}
