//! From measured matrices to the result: gates, groups, cycles, and the comparison with an earlier result.

use super::{Matrix, Options, Skipped, Source, Spectrum, against, cycles, groups, judge, totals};
use crate::error::Result;

/// Judges the gates and summarises.
pub(super) fn complete(
    options: &Options,
    sources: Vec<Source>,
    matrices: Vec<Matrix>,
    skipped: Vec<Skipped>,
    before: Option<Spectrum>,
) -> Result<Spectrum> {
    let gates = judge::judge(&options.gates, &sources, &matrices, &skipped)?;
    let groups = groups::groups(totals(&sources, &matrices));
    let cycles = cycles::summarise(&matrices);
    let mut spectrum =
        Spectrum { schema: 1, groups, sources, matrices, gates, skipped, cycles, against: None, part: None };
    if let (Some(path), Some(before)) = (&options.against, before) {
        spectrum.against = Some(against::compare(path, &before, &spectrum));
    }
    Ok(spectrum)
}
