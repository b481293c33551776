//! Measuring divided over the jobs of an array: each measures and writes one part of the matrices, and joining all parts
//! gives what one process gives, to the byte.

use super::{
    Matrix, Measures, Options, Reason, Skipped, Source, Spectrum, against,
    complete::complete,
    judge::{self, Covered},
    measures,
    sources::OpenSource,
    svd::Method,
};
use crate::{
    error::{Error, Result},
    inputs,
    job_array::{self, ArrayTask, Discrepancy, Identity},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

/// What a part knows beyond its own matrices. Everything but `index` and `measured` is the same in all parts of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Which part, from 1.
    pub index: usize,
    /// Of how many.
    pub count: usize,
    /// What all parts have in common.
    #[serde(flatten)]
    pub job: Identity,
    /// Weights to measure, over all parts.
    pub weights: usize,
    /// The first so many entries of `skipped` are the same in all parts.
    pub skipped_by_all: usize,
    /// The weights of this part.
    pub measured: Vec<MeasuredWeight>,
}

/// One weight of a part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredWeight {
    /// Its index in the whole.
    pub weight: usize,
    /// For each of its matrices (none if it was skipped) the noise edge and the singular values to the last bit: 16
    /// hexadecimal digits each, the bits of an f64. Reading JSON's decimal numbers may round them.
    pub values: Vec<String>,
}

impl MeasuredWeight {
    pub(super) fn new(weight: usize, matrices: &[Matrix]) -> MeasuredWeight {
        let hex = |x: &f64| format!("{:016x}", x.to_bits());
        let values =
            |m: &Matrix| std::iter::once(&m.measures.noise_edge).chain(m.sigma.iter().flatten()).map(hex).collect();
        MeasuredWeight { weight, values: matrices.iter().map(values).collect() }
    }
}

/// Gives `matrix` back what it was measured with; `None` if `values` are not its own.
fn restore(matrix: &mut Matrix, values: &str, rank_tol: Option<f64>) -> Option<()> {
    let number = |digits: &[u8]| Some(f64::from_bits(u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?));
    let mut values = values.as_bytes().chunks(16).map(number).collect::<Option<Vec<f64>>>()?.into_iter();
    let noise_edge = values.next()?;
    let sigma: Vec<f64> = values.collect();
    // Singular values are finite, not negative, and come largest first; so is a bound on them.
    let ordered = sigma.iter().zip(sigma.iter().skip(1)).all(|(a, b)| a >= b);
    let valid = |x: f64| x.is_finite() && x >= 0.0;
    if !ordered || !valid(noise_edge) || !sigma.iter().all(|&x| valid(x)) {
        return None;
    }
    let shape = (matrix.shape[0], matrix.shape[1]);
    if sigma.len() != shape.0.min(shape.1) {
        return None;
    }
    let tolerance = rank_tol.unwrap_or_else(|| measures::default_tolerance(shape));
    matrix.measures = Measures::new(&sigma, shape, tolerance, noise_edge);
    matrix.sigma = Some(sigma);
    Some(())
}

const RANK: &str = "--rank";
const RANK_TOL: &str = "--rank-tol";

/// The options that decide what is measured, and how. Numbers as text, to the last bit; of the device only the kind, since
/// kinds differ in the last digits.
fn measuring(options: &Options) -> BTreeMap<String, Value> {
    let dense = options.method == Method::Dense;
    let pairs = [
        ("--filter", json!(options.filter)),
        (RANK_TOL, json!(options.rank_tolerance.map(|x| x.to_string()))),
        ("--roundings", json!(options.roundings)),
        (RANK, json!(options.rank)),
        ("--dense", json!(dense)),
        ("--common-only", json!(options.common_only)),
        ("--skip-nonfinite", json!(options.skip_nonfinite)),
        ("--device", json!(if options.gpu.is_some() { "cuda" } else { "cpu" })),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

impl Part {
    pub(super) fn new(array: ArrayTask, options: &Options, opened: &[OpenSource], weights: usize) -> Result<Part> {
        let job = Identity::new(measuring(options), opened.iter().flat_map(OpenSource::files))?;
        let ArrayTask { index, count } = array;
        Ok(Part { index, count, job, weights, skipped_by_all: 0, measured: Vec::new() })
    }

    fn name(&self) -> String {
        ArrayTask { index: self.index, count: self.count }.to_string()
    }
}

fn unique_files(opened: &[OpenSource]) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    opened.iter().flat_map(OpenSource::files).filter(|file| seen.insert(file.clone())).collect()
}

/// The files that this job hashes: every file of the sources is read in full by one job only.
pub(super) fn own_files(array: ArrayTask, opened: &[OpenSource]) -> Result<HashSet<PathBuf>> {
    let files = unique_files(opened);
    let bytes = |file: &PathBuf| fs::metadata(file).map(|m| m.len() as f64).map_err(|e| Error::io("read", file, e));
    let own = array.owns(&files.iter().map(bytes).collect::<Result<Vec<_>>>()?);
    Ok(files.into_iter().zip(own).filter(|(_, own)| *own).map(|(file, _)| file).collect())
}

/// A part that was read, and where from.
struct Read<'a> {
    path: &'a Path,
    spectrum: Spectrum,
    part: Part,
}

impl Read<'_> {
    fn parse<'a>((path, json): &'a (PathBuf, Vec<u8>)) -> Result<Read<'a>> {
        let mut spectrum = against::parse(path, json)?;
        match spectrum.part.take() {
            Some(part) => {
                check_sizes(&spectrum, &part).map_err(|what| {
                    Error::request(format!("'{}' is damaged: {what}", path.display())).help("measure this part again")
                })?;
                Ok(Read { path, spectrum, part })
            }
            None => Err(Error::request(format!("'{}' is no part but a whole result", path.display()))
                .help("parts are written by `relora-kit spectrum --part I/N`")),
        }
    }
}

/// What no part that this program wrote has. Numbers are checked before anything is allocated by them.
fn check_sizes(spectrum: &Spectrum, part: &Part) -> std::result::Result<(), String> {
    if !(1..=part.count).contains(&part.index) {
        return Err(format!("it is part {} of {}", part.index, part.count));
    }
    if part.skipped_by_all > spectrum.skipped.len() {
        return Err(format!("{} tensors are skipped, it lists {}", part.skipped_by_all, spectrum.skipped.len()));
    }
    for m in &spectrum.matrices {
        let shown = format!("matrix '{}' of shape {:?}", m.name, m.shape);
        if m.shape[0].checked_mul(m.shape[1]).is_none_or(|elements| elements == 0) {
            return Err(format!("{shown} has no elements, or more than there can be"));
        }
    }
    for (file, hash) in spectrum.sources.iter().flat_map(|s| &s.files) {
        if !is_sha256(hash) {
            return Err(format!("the hash of '{file}' is not 64 hexadecimal digits"));
        }
    }
    match part.job.inputs.iter().find(|(_, digest)| !is_sha256(digest)) {
        Some((file, _)) => Err(format!("the digest of '{}' is not 64 hexadecimal digits", file.display())),
        None => Ok(()),
    }
}

fn is_sha256(hash: &str) -> bool {
    hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Joins all parts of a job. Of `options` only the gates, `against`, `sigma` and `hashes` count: the rest was decided when
/// the parts were measured.
pub fn join(paths: &[PathBuf], options: &Options) -> Result<Spectrum> {
    let read = |path: &PathBuf| Ok((path.clone(), inputs::read(path, against::MAX_BYTES)?));
    join_read(paths.iter().map(read).collect::<Result<Vec<_>>>()?, options)
}

/// [`join`], of the content of parts and the names they go by.
pub(super) fn join_read(parts: Vec<(PathBuf, Vec<u8>)>, options: &Options) -> Result<Spectrum> {
    let before = options.against.as_deref().map(against::read).transpose()?;
    let mut parts = parts.iter().map(Read::parse).collect::<Result<Vec<_>>>()?;
    let Some(first) = parts.first() else { return Err(Error::request("there is no part to join")) };
    parts[1..].iter().try_for_each(|other| check_same_job(first, other))?;
    check_all_there(&parts)?;
    parts.sort_by_key(|p| p.part.index);
    let sources = join_sources(&parts, options.hashes);
    let (matrices, skipped) = join_matrices(parts.iter_mut().map(|p| (p.path, &mut p.spectrum, &p.part)).collect())?;
    for source in &sources {
        judge::check_roundings(&options.gates, &source.label, source.roundings.as_ref())?;
    }
    let covered = covered(&matrices, &skipped, &sources, &parts[0].part);
    judge::check_gates(&options.gates, sources.iter().map(|s| s.label.as_str()), &covered, &skipped)?;
    let mut spectrum = complete(options, sources, matrices, skipped, before)?;
    if !options.sigma {
        spectrum.forget_sigma();
    }
    Ok(spectrum)
}

/// Refuses a part that another command line, other files or another program made, and says what differs.
fn check_same_job(a: &Read, b: &Read) -> Result<()> {
    let (x, y) = (&a.part, &b.part);
    let differs = |what: &str, one: String, other: String| {
        Err(Error::request(format!(
            "'{}' and '{}' are parts of different jobs: {what} is {one} in the first and {other} in the second",
            a.path.display(),
            b.path.display()
        ))
        .help("measure all parts with the same options, over the same files"))
    };
    let described = |r: &Read| -> Vec<String> {
        let path = |p: &PathBuf| p.display().to_string();
        let one = |s: &Source| {
            format!("'{}' ({}{})", s.label, s.base.as_ref().map_or(String::new(), |b| path(b) + " to "), path(&s.path))
        };
        r.spectrum.sources.iter().map(one).collect()
    };
    let (one, other) = (described(a), described(b));
    if one != other {
        return differs("the list of sources", one.join(", "), other.join(", "));
    }
    if let Some(Discrepancy { what, one, other }) = x.job.difference(&y.job) {
        return differs(&what, one, other);
    }
    if x.count != y.count {
        return differs("the number of parts", x.count.to_string(), y.count.to_string());
    }
    if (x.weights, x.skipped_by_all) != (y.weights, y.skipped_by_all) {
        return differs("the number of weights", x.weights.to_string(), y.weights.to_string());
    }
    Ok(())
}

fn check_all_there(parts: &[Read]) -> Result<()> {
    for (i, part) in parts.iter().enumerate() {
        if let Some(other) = parts[..i].iter().find(|p| p.part.index == part.part.index) {
            return Err(Error::request(format!(
                "part {} is given twice: '{}' and '{}'",
                part.part.name(),
                other.path.display(),
                part.path.display()
            ))
            .help("name every part once"));
        }
    }
    let found: Vec<usize> = parts.iter().map(|p| p.part.index).collect();
    match job_array::missing(&found, parts[0].part.count) {
        None => Ok(()),
        Some(missing) => Err(Error::request(missing).help("measure them with --part, or name their files, too")),
    }
}

/// The sources, with the hashes that each part took of its share of the files.
fn join_sources(parts: &[Read], hashes: bool) -> Vec<Source> {
    let mut sources = parts[0].spectrum.sources.clone();
    for (i, source) in sources.iter_mut().enumerate() {
        source.files.clear();
        if hashes {
            source.files.extend(parts.iter().flat_map(|p| p.spectrum.sources[i].files.clone()));
        }
    }
    sources
}

/// Matrices and skipped tensors in the order of one process.
fn join_matrices(parts: Vec<(&Path, &mut Spectrum, &Part)>) -> Result<(Vec<Matrix>, Vec<Skipped>)> {
    let mut skipped = Vec::new();
    let weights = parts.iter().map(|(_, _, part)| part.measured.len()).sum::<usize>();
    let mut found: Vec<Option<(Vec<Matrix>, Option<Skipped>)>> = Vec::new();
    found.resize_with(weights, || None);
    for (i, (path, spectrum, part)) in parts.into_iter().enumerate() {
        let damaged = || {
            Error::request(format!("'{}' is damaged: its matrices do not fit its list of weights", path.display()))
                .help("measure this part again")
        };
        let mut matrices = std::mem::take(&mut spectrum.matrices).into_iter();
        let mut skips = std::mem::take(&mut spectrum.skipped).into_iter();
        let by_all: Vec<Skipped> = skips.by_ref().take(part.skipped_by_all).collect();
        if i == 0 {
            skipped = by_all;
        }
        let rank_tol = part.job.options.get(RANK_TOL).and_then(Value::as_str);
        let rank_tol = rank_tol.map(|text| text.parse::<f64>().map_err(|_| damaged())).transpose()?;
        for MeasuredWeight { weight, values } in &part.measured {
            let mut own: Vec<Matrix> = matrices.by_ref().take(values.len()).collect();
            let skip = if values.is_empty() { Some(skips.next().ok_or_else(damaged)?) } else { None };
            let restored = own.iter_mut().zip(values).filter_map(|(m, v)| restore(m, v, rank_tol)).count();
            let place = found.get_mut(*weight).filter(|place| place.is_none()).ok_or_else(damaged)?;
            if restored != values.len() {
                return Err(damaged());
            }
            *place = Some((own, skip));
        }
        if matrices.next().is_some() || skips.next().is_some() || part.weights != weights {
            return Err(damaged());
        }
    }
    let mut all = Vec::new();
    for (matrices, skip) in found.into_iter().flatten() {
        all.extend(matrices);
        skipped.extend(skip);
    }
    Ok((all, skipped))
}

/// What gates can be about: every weight, also those that turned out not to be finite.
fn covered<'a>(matrices: &'a [Matrix], skipped: &'a [Skipped], sources: &[Source], part: &Part) -> Vec<Covered<'a>> {
    let with_rank = part.job.options.get(RANK).is_some_and(|rank| !rank.is_null());
    let ranked = |label: &str| with_rank || sources.iter().any(|s| s.label == label && s.kind != "checkpoints");
    let measured = matrices.iter().map(|m| Covered { label: &m.label, name: &m.name, ranked: m.r.is_some() });
    let broken = skipped.iter().filter(|s| s.reason == Reason::NonFinite);
    measured.chain(broken.map(|s| Covered { label: &s.label, name: &s.name, ranked: ranked(&s.label) })).collect()
}
