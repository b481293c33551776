//! The difference of two stored matrices, formed straight from the two memory maps, block by block.

use super::{
    Options, Reason, Skipped, names,
    noise::UlpSums,
    source::{Job, Work, skipped},
};
use crate::{
    checkpoint::{Checkpoint, Filter, Tensor, dtype, natural_key},
    error::{Error, Result},
};
use std::ops::Range;

/// `tuned - base`, exact for F32 and shorter types up to one f64 rounding.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// The earlier weight.
    pub base: Tensor<'a>,
    /// The later weight, of the same shape.
    pub tuned: Tensor<'a>,
    /// Rows and columns.
    pub shape: (usize, usize),
}

/// Where a difference is NaN or infinite, and what the two sides hold there.
#[derive(Clone, Copy, Debug)]
pub struct NonFinite {
    /// Row and column.
    pub index: (usize, usize),
    /// `W0` there.
    pub base: f64,
    /// `Wn` there.
    pub tuned: f64,
}

impl NonFinite {
    /// The finding as a clause, with the files.
    pub fn describe(&self, pair: &Pair) -> String {
        let ((i, j), file) = (self.index, |t: Tensor| t.file().path().display().to_string());
        format!(
            "the delta is not finite at [{i}, {j}]: '{}' holds {} and '{}' holds {}",
            file(pair.base),
            self.base,
            file(pair.tuned),
            self.tuned
        )
    }
}

impl Pair<'_> {
    /// Writes block `rows x columns` of the difference into `out`, row-major, and notes the units in the last place of
    /// the tuned side in `ulps`. Stops at the first entry that is not finite.
    pub fn block(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [f64],
        ulps: &mut UlpSums,
    ) -> Result<std::result::Result<(), NonFinite>> {
        let width = columns.len();
        if (rows.len(), width) == self.shape {
            // The whole matrix at once comes first, or after panels that were given up: counted once.
            *ulps = UlpSums::new(self.shape.0, self.shape.1);
        }
        let mut base = vec![0.0; width];
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            let first = row * self.shape.1 + columns.start;
            self.tuned.read_f64(first, out)?;
            self.base.read_f64(first, &mut base)?;
            // x - x is 0 for finite x and NaN otherwise: one sum finds any offender.
            if out.iter().zip(&base).map(|(t, b)| (t - b) * 0.0).sum::<f64>() != 0.0 {
                let found = out.iter().zip(&base).position(|(t, b)| !(t - b).is_finite()).unwrap_or(0);
                let index = (row, columns.start + found);
                return Ok(Err(NonFinite { index, base: base[found], tuned: out[found] }));
            }
            ulps.add(self.tuned.dtype(), row, columns.start, out);
            out.iter_mut().zip(&base).for_each(|(t, b)| *t -= b);
        }
        Ok(Ok(()))
    }
}

/// Adds the matrices that both checkpoints hold to `jobs`, and every other tensor to `skip` or refuses it.
pub fn plan<'a>(
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
        cycles: None,
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
