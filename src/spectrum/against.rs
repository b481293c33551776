//! This result against an earlier one: what became of every module kind, and which matrices lost rank.

use super::{Matrix, Spectrum, groups::Range};
use crate::{
    error::{Error, Result},
    inputs,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Bytes of the largest result that is read: all singular values of 100,000 matrices of 1,000 take less.
pub(super) const MAX_BYTES: u64 = 4 << 30;

/// A comparison with an earlier result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// The earlier result.
    #[serde(serialize_with = "crate::escape::lossy")]
    pub path: PathBuf,
    /// Matrices that both results hold.
    pub matrices: usize,
    /// Matrices of this result that the earlier one lacks.
    pub only_here: Vec<String>,
    /// Matrices of the earlier result that this one lacks.
    pub only_there: Vec<String>,
    /// Per source and module kind.
    pub changes: Vec<Change>,
    /// Matrices whose `rank_above_noise` fell, the largest loss first; at most 10.
    pub losses: Vec<Loss>,
}

/// What became of one module kind: medians over the matrices that both results hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Source.
    pub label: String,
    /// Module kind.
    pub module: String,
    /// `rank_above_noise` before and now.
    pub rank_above_noise: (f64, f64),
    /// `effective_rank` before and now; absent where undefined.
    pub effective_rank: Option<(f64, f64)>,
    /// `spectral_norm` before and now.
    pub spectral_norm: (f64, f64),
}

/// A matrix that lost rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Source.
    pub label: String,
    /// Tensor.
    pub name: String,
    /// `rank_above_noise` before.
    pub before: usize,
    /// `rank_above_noise` now.
    pub now: usize,
}

/// Reads a whole result that `--format json` wrote.
pub fn read(path: &Path) -> Result<Spectrum> {
    let spectrum = open(path)?;
    if let Some(part) = &spectrum.part {
        return Err(Error::request(format!(
            "'{}' is part {} of {} of a spectrum, not a whole one",
            path.display(),
            part.index,
            part.count
        ))
        .help("join all parts with --join first"));
    }
    Ok(spectrum)
}

/// Reads a result or a part of one.
pub(super) fn open(path: &Path) -> Result<Spectrum> {
    let text = inputs::read(path, MAX_BYTES)?;
    parse(path, &text)
}

/// The result, or part of one, that `path` holds.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Spectrum> {
    let spectrum: Spectrum = serde_json::from_slice(text).map_err(|e| {
        Error::request(format!("'{}' is not a spectrum: {e}", path.display()))
            .help("name a file written by `relora-kit spectrum --format json`")
    })?;
    if spectrum.schema != 1 {
        return Err(Error::request(format!("'{}' has schema {}, expected 1", path.display(), spectrum.schema))
            .help("write it again with this version"));
    }
    Ok(spectrum)
}

/// Compares the whole updates of both results, matrix by matrix. Labels must agree, unless both have a single source.
pub fn compare(path: &Path, before: &Spectrum, now: &Spectrum) -> Against {
    let any_label = before.sources.len() == 1 && now.sources.len() == 1;
    let same = |a: &Matrix, b: &Matrix| a.name == b.name && (any_label || a.label == b.label);
    let here: Vec<&Matrix> = now.totals().collect();
    let there: Vec<&Matrix> = before.totals().collect();
    let pairs: Vec<(&Matrix, &Matrix)> =
        here.iter().filter_map(|h| Some((*there.iter().find(|t| same(t, h))?, *h))).collect();
    let missing = |from: &[&Matrix], other: &[&Matrix]| -> Vec<String> {
        from.iter().filter(|m| !other.iter().any(|o| same(m, o))).map(|m| m.name.clone()).collect()
    };
    let mut losses: Vec<Loss> = pairs
        .iter()
        .map(|(t, h)| Loss {
            label: h.label.clone(),
            name: h.name.clone(),
            before: t.measures.rank_above_noise,
            now: h.measures.rank_above_noise,
        })
        .filter(|l| l.now < l.before)
        .collect();
    losses.sort_by_key(|l| (std::cmp::Reverse(l.before - l.now), l.name.clone()));
    losses.truncate(10);
    let changes = now.groups.iter().filter_map(|g| {
        let of = |m: &Matrix| m.label == g.label && m.module == g.module;
        change(&g.label, &g.module, &pairs.iter().copied().filter(|(_, h)| of(h)).collect::<Vec<_>>())
    });
    Against {
        path: path.to_owned(),
        matrices: pairs.len(),
        only_here: missing(&here, &there),
        only_there: missing(&there, &here),
        changes: changes.collect(),
        losses,
    }
}

fn change(label: &str, module: &str, pairs: &[(&Matrix, &Matrix)]) -> Option<Change> {
    let medians = |of: fn(&Matrix) -> Option<f64>| {
        let median = |values: Vec<f64>| Range::of(values.into_iter()).map(|r| r.median);
        let before = median(pairs.iter().filter_map(|(t, _)| of(t)).collect())?;
        Some((before, median(pairs.iter().filter_map(|(_, h)| of(h)).collect())?))
    };
    Some(Change {
        label: label.to_owned(),
        module: module.to_owned(),
        rank_above_noise: medians(|m| Some(m.measures.rank_above_noise as f64))?,
        effective_rank: medians(|m| m.measures.effective_rank),
        spectral_norm: medians(|m| Some(m.measures.spectral_norm))?,
    })
}
